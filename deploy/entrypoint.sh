#!/usr/bin/env bash
# Of the image: `docker run IMAGE PRESET ...` trains on all GPUs that the container sees, or on the CPU where there are
# none; `docker run IMAGE COMMAND ...` runs a command, for example torchrun with options of its own.
set -euo pipefail

case ${1:-} in
    torchrun | python | python3 | pip | bash | sh | env | nvidia-smi | /*) exec "$@" ;;
    -h | --help | "") exec python /opt/cmac/train.py --help ;;
esac
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU') || true
ranks=${RANKS:-$gpus}
if [ "$ranks" -gt 0 ]; then
    # Docker signals the first process alone; torchrun passes it on, and the ranks save before they end.
    exec torchrun --standalone --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        --nproc-per-node "$ranks" /opt/cmac/train.py "$@"
fi
echo "entrypoint.sh: no GPU is visible (docker run --gpus all ...): training on the CPU" >&2
exec python /opt/cmac/train.py "$@"
