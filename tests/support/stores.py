"""An object store on the loopback: moto's, which answers as S3 does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "anonymous",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}


@contextmanager
def s3() -> Iterator[str]:
    """The address of an empty bucket; the environment says where its store is, to child processes as well."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    server_module = pytest.importorskip("moto.server", reason="needs moto[s3], flask and flask-cors")
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = {name: os.environ.get(name) for name in (*VARIABLES, "AWS_ENDPOINT_URL")}
    os.environ.update(VARIABLES, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    # Of an earlier store in this process there is left: the client, which would go on asking that, and its buckets.
    s3fs.S3FileSystem.clear_instance_cache()
    with urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")):
        pass
    try:
        s3fs.S3FileSystem(use_listings_cache=False).mkdir("worlds")
        yield "s3://worlds"
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
