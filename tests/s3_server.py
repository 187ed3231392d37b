"""An S3 server on loopback, in a process of its own: python s3_server.py PORT COPY [NUM_GETS]

moto keeps everything in memory. So a server that comes back after it was killed is filled from COPY, a folder with a
folder for each bucket, before it listens on PORT; it prints a line when it does. With NUM_GETS it kills itself by
SIGKILL in the middle of sending the tar that is asked for as that one.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

CREDENTIALS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}


def serve(application: Callable, port: int) -> BaseWSGIServer:
    server = make_server("127.0.0.1", port, application, True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def mortal(application: Callable, num_gets: int) -> Callable:
    """The application, until the tar that is asked for as number num_gets."""
    asked, lock = 0, threading.Lock()

    def call(environ: dict, start_response: Callable) -> Iterable[bytes]:
        nonlocal asked
        body = application(environ, start_response)
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar"):
            with lock:
                asked += 1
                if asked == num_gets:
                    return die_after_half(b"".join(body))
        return body

    return call


def die_after_half(body: bytes) -> Iterable[bytes]:
    yield body[: len(body) // 2]
    os.kill(os.getpid(), signal.SIGKILL)


def main(port: int, copy: Path, num_gets: int) -> None:
    application = DomainDispatcherApplication(create_backend_app)
    filling = serve(application, 0)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{filling.server_port}", **CREDENTIALS)
    for bucket in copy.iterdir():
        client.create_bucket(Bucket=bucket.name)
        for path in sorted(bucket.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket.name, path.relative_to(bucket).as_posix())
    filling.shutdown()
    serve(mortal(application, num_gets), port)
    print("serving", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
