"""What `mmkt submit` sends: the files of a folder that a job needs,
and none that holds a secret or leads out of it."""

from __future__ import annotations

import fnmatch
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmkt_ray.errors import ConfigError
from mmkt_ray.ray_private import quieten, walk

MAX_BYTES = 100_000_000  # code and configs; data travels by storage
NUM_NAMED = 5  # of what is too large
SECRET_NAMES = (
    *(".env*", "*.env", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", ".my.cnf", ".s3cfg", ".boto", ".htpasswd"),
    *(".config", "*_history", ".databrickscfg", ".dockercfg", "rclone.conf", "pip.conf", "kaggle.json", "auth.json"),
    *(".aws", ".ssh", ".gnupg", ".kube", ".docker", ".azure", ".gcloud", ".oci", ".ray", ".huggingface"),
    *(
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.ppk",
        "*.jks",
        "*.keytab",
    ),
    *("*.key.*", "key.json", "*apikey*", "*api[-_]key*", "*accesskey*", "rootkey*", "keystore*", "*.kdbx", "password*"),
    *("*credentials", "*credentials.*", "*service[-_]account*.json", "*secret*.json", "*secret*.y*ml"),
    *("secrets", "secrets.*", "*.tfvars", "*.tfstate*"),
    *("token", "token.*", "authtoken", "*.token", "*[-_]token", "*[-_]token.txt", "*.jwt"),
)
SOURCE = {".py", ".pyi", ".md", ".rst"}  # code and prose about tokens and credentials
PRIVATE_KEY = re.compile(rb"^-----BEGIN [A-Z ]*PRIVATE KEY-----", re.MULTILINE)
HEAD_BYTES = 4096  # of a file, looked at for a private key


@dataclass(frozen=True)
class Upload:
    """Files by their path in the folder, with their sizes, and what stays because it may hold a secret or leads
    out."""

    folder: Path
    sizes: dict[str, int]
    kept_back: tuple[str, ...]

    def __str__(self) -> str:
        tops = Counter(name.partition("/")[0] + "/" * ("/" in name) for name in self.sizes)
        parts = ", ".join(f"{top} ({n} files)" if top.endswith("/") else top for top, n in sorted(tops.items()))
        text = (
            f"uploads {len(self.sizes)} files, {sum(self.sizes.values()) / 1e6:.1f} MB, of '{self.folder}': "
            f"{parts}"
        )
        if self.kept_back:
            text += f"\nstays here, as secrets or links out of the folder do: {', '.join(self.kept_back)}"
        return text


def choose_files(folder: Path, excludes: Sequence[str]) -> Upload:
    """All files but those that .gitignore, .rayignore and `excludes` (lines of a .gitignore) name, and secrets.

    Raises: ConfigError if they are too large.
    """
    quieten()
    root = folder.resolve()
    sizes: dict[str, int] = {}
    kept_back: list[str] = []

    def stays(path: Path) -> bool:
        if path != root and (is_secret(path) or leads_out(path, root)):
            kept_back.append(str(path.relative_to(root)))
            return True
        return False

    def take(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(root))] = path.stat().st_size

    walk(root, excludes, stays, take)
    check_size(sizes)
    return Upload(root, sizes, tuple(sorted(kept_back)))


def is_secret(path: Path) -> bool:
    """Whether a file or folder is one that credentials are kept in, by its name,
    or a private key by its beginning."""
    name = path.name.lower()
    if path.suffix not in SOURCE and any(fnmatch.fnmatchcase(name, pattern) for pattern in SECRET_NAMES):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named and path.resolve() == Path(named).expanduser().resolve():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return bool(PRIVATE_KEY.search(file.read(HEAD_BYTES)))


def leads_out(path: Path, root: Path) -> bool:
    """Whether it is a link that ends outside of the folder, or in a folder that holds the link."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return not target.is_relative_to(root) or path.is_relative_to(target)


def check_size(sizes: dict[str, int]) -> None:
    """Raises: ConfigError that names the largest files."""
    if (total := sum(sizes.values())) > MAX_BYTES:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:NUM_NAMED]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise ConfigError(
            f"the folder has {total / 1e6:.1f} MB to upload, and at most {MAX_BYTES / 1e6:.0f} MB may travel; the "
            f"largest: {named}: name what the job does not need in .rayignore"
        )


@contextmanager
def packed(upload: Upload) -> Iterator[Path]:
    """The files as a zip that this user alone can read, gone afterwards. Equal files give equal bytes."""
    with tempfile.TemporaryDirectory(prefix="mmkt-submit-") as scratch:  # mode 0700
        path = Path(scratch, "folder.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
            for name in sorted(upload.sizes):
                file = upload.folder / name
                about = zipfile.ZipInfo(name)
                about.compress_type, about.external_attr = zipfile.ZIP_DEFLATED, (file.stat().st_mode & 0o777) << 16
                package.writestr(about, file.read_bytes())
        yield path
