"""What a command says when it fails: one sentence for what the user can mend,
and where the traceback is for all else."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback

from mmkt_ray.errors import ResourceError, UserError


def tell_error(error: Exception, with_traceback: bool = False) -> int:
    """A sentence for what the user can mend, and for what is ours to mend; the exit status."""
    if with_traceback:
        traceback.print_exception(error)
    mendable = find_user_error(error)
    print(f"mmkt: {mendable or tell_unexpected(error)}", file=sys.stderr)
    return 2 if mendable else 1


_ADVICE_OF_RAY = re.compile(r"\nFailed to .{1,200} after \d+/\d+ attempts .*", re.DOTALL)


def tell_unexpected(error: Exception) -> str:
    """One sentence for what nobody foresaw: the innermost error, and the file that its traceback is written to."""
    seen: BaseException = error
    while inner := getattr(seen, "cause", None) or seen.__cause__:
        seen = inner
    text = _ADVICE_OF_RAY.sub("", str(seen)).strip().split("\n")[0][:500]
    handle, path = tempfile.mkstemp(prefix="mmkt-traceback-", suffix=".txt", text=True)
    with os.fdopen(handle, "w") as file:
        file.writelines(traceback.format_exception(error))
    return f"unexpected {type(seen).__name__}: {text}; the traceback is in {path}"


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError behind an exception, also where Ray has wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return UserError(_ADVICE_OF_RAY.sub("", str(getattr(seen, "cause", seen))))
        if type(seen).__name__ in ("OutOfDiskError", "ObjectStoreFullError"):  # of Ray, which is not imported for this
            return ResourceError(
                "Ray's object store and the disk that it spills to are full: free some space there and give the same "
                "command again"
            )
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    if isinstance(error, OSError):  # of a file, or of an object store that does not answer
        why = getattr(error, "cause", error)  # without Ray's traceback
        return ResourceError(f"cannot read or write: {why}; mend that and give the same command again")
    return None
