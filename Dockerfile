# CMAC with CUDA, DALI and NVIDIA Apex.
#
#   docker build -t cmac --build-arg TORCH_CUDA_ARCH_LIST="9.0" --build-arg COMMIT="$(git describe --always --dirty)" .
#   docker run --rm --init --gpus all --shm-size 16g -v "$PWD/data:/workspace/data" -v "$PWD/runs:/workspace/runs" \
#       cmac pretrain-k400 --loader.shards data/k400-train
#
# CUDA is the version that the torch wheel of constraints.txt is built for: Apex is compiled against both.
ARG CUDA=13.0.1
ARG UBUNTU=24.04

FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS builder
ENV VENV=/opt/venv \
    PIP_NO_CACHE_DIR=1
COPY deploy/install.sh /opt/cmac/deploy/install.sh
RUN /opt/cmac/deploy/install.sh system-build
# Packages before sources: a change of the sources does not install gigabytes again.
WORKDIR /opt/cmac
COPY setup.py constraints.txt README.md ./
ARG EXTRAS="s3,ray,slurm,wandb"
RUN deploy/install.sh python
# 0: without Apex, which is optional.
ARG APEX=1
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ARG MAX_JOBS
RUN if [ "$APEX" = 1 ]; then deploy/install.sh apex; fi
COPY . .
RUN deploy/install.sh python check \
    && /opt/venv/bin/python -m compileall -q cmac loaders shards tools train.py

FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU} AS runtime
COPY deploy/install.sh /opt/cmac/deploy/install.sh
RUN /opt/cmac/deploy/install.sh system-run \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/cmac --shell /usr/sbin/nologin cmac \
    && install --directory --mode 1777 /var/cache/cmac /workspace /workspace/data /workspace/runs
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/cmac /opt/cmac
ARG COMMIT=""
# All that is written outside of /workspace/runs and /tmp goes to /var/cache/cmac, which any user may write to; with
# --read-only, mount something there. "video": NVDEC.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/cmac \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    HOME=/var/cache/cmac \
    USER=cmac \
    XDG_CACHE_HOME=/var/cache/cmac \
    MPLCONFIGDIR=/var/cache/cmac/matplotlib \
    TRITON_CACHE_DIR=/var/cache/cmac/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/cmac/inductor \
    CMAC_COMMIT=${COMMIT}
WORKDIR /workspace
VOLUME ["/var/cache/cmac", "/workspace/runs"]
USER 10001:10001
ENTRYPOINT ["/opt/cmac/deploy/entrypoint.sh"]
CMD ["--help"]
