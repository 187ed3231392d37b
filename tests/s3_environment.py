"""Where S3 is for this process and those it starts."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_at(url: str) -> Iterator[None]:
    """Inside, s3:// leads to the server at `url`."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        s3fs.S3FileSystem.clear_instance_cache()  # else those of an earlier server are given out again
        yield
        s3fs.S3FileSystem.clear_instance_cache()
