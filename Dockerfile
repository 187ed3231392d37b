# CMAC with CUDA 13, DALI and NVIDIA Apex. Build: docker build -t cmac .   Run: docker run --gpus all -it cmac
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg git make python3 python3-dev python3-venv build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/cmac
COPY . .
RUN make .venv/.installed-tests
ENV PATH=/opt/cmac/.venv/bin:$PATH

# NVIDIA Apex is optional and built from source; the package of that name on the package index is another project.
ARG APEX=0
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
RUN if [ "$APEX" = 1 ]; then \
        git clone --depth 1 https://github.com/NVIDIA/apex /opt/apex \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python -m pip install --no-build-isolation /opt/apex; \
    fi

CMD ["torchrun", "--nproc-per-node", "8", "train.py", "pretrain-k400"]
