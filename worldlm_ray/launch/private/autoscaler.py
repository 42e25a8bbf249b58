"""The checks that `ray up` makes of a cluster description. Its only public form starts the cluster, too.

Importing it takes a second.
"""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from ray.autoscaler._private.util import prepare_config, validate_config


def validate(description: dict[str, Any]) -> None:
    """Check a description against Ray's schema. Ray prints meanwhile; nothing of it reaches the terminal.

    Raises:
        jsonschema.exceptions.ValidationError: a value that the schema does not permit.
        Exception: any other error that Ray has for it.
    """
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        validate_config(prepare_config(description))
