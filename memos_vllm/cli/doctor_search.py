"""The checks of `memos-vllm doctor` about search: what embeds, and what keeps the index."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from memos_vllm.cli import output
from memos_vllm.cli.findings import Finding, Level, import_problem, installed

# What embeds with each kind of setting, as modules and as the packages that hold them.
_PACKAGES = {
    "sentence-transformers": ("sentence_transformers", "sentence-transformers"),
    "fastembed": ("fastembed", "fastembed"),
}
_DEFAULT_MODULES = ("onnxruntime", "tokenizers")
_NO_EMBEDDER = "none"


def check_embedder(spec: str, models_dir: Path) -> Finding:
    """Whether the embedder that is set can be opened here.

    Args:
        models_dir: where prepared models are.
    """
    from memos_vllm.config import DEFAULT_EMBEDDER

    name = "embedder"
    if spec == DEFAULT_EMBEDDER:
        return _broken(name, _DEFAULT_MODULES) or _check_prepared(spec, models_dir / spec)
    if spec == _NO_EMBEDDER:
        return Finding(Level.OK, name, "none: memories are found by their words only")
    kind, _, rest = spec.partition(":")
    if rest and kind in _PACKAGES:
        module, package = _PACKAGES[kind]
        found = _broken(name, (module,), package=package)
        return found or Finding(Level.OK, name, f"{spec}; its model is loaded by the server")
    if rest and kind == "openai":
        # Its URL may hold a password.
        return Finding(Level.OK, name, f"openai:{rest.partition('@')[0]}, asked over HTTP")
    return Finding(
        Level.FAIL,
        name,
        f"MEMOS_EMBEDDER is '{spec}' and must be {DEFAULT_EMBEDDER}, sentence-transformers:MODEL, "
        "fastembed:NAME, openai:MODEL@URL or none",
    )


def check_index(qdrant_url: str | None) -> Finding:
    """Whether the search index can be opened: Qdrant Edge in the data folder, or a server's."""
    name = "search index"
    if qdrant_url is None:
        found = _broken(name, ("qdrant_edge",), package="qdrant-edge-py")
        version = installed("qdrant-edge-py") or "of an unknown version"
        return found or Finding(Level.OK, name, f"Qdrant Edge {version}, in the data folder")
    found = _broken(name, ("qdrant_client",), package="qdrant-client")
    host = urlsplit(qdrant_url).netloc.rpartition("@")[2]
    return found or Finding(Level.OK, name, f"the Qdrant server at {host}")


def _broken(name: str, modules: tuple[str, ...], *, package: str | None = None) -> Finding | None:
    for module in modules:
        reason = import_problem(module)
        if reason is not None:
            return Finding(
                Level.FAIL,
                name,
                f"{module} does not load ({output.one_line(reason, limit=120)}): "
                f"pip install {package or module}",
            )
    return None


def _check_prepared(spec: str, folder: Path) -> Finding:
    from memos_vllm.models.packaged import is_prepared
    from memos_vllm.models.prepare import KNOWN_EMBEDDERS

    name = "embedder"
    model = KNOWN_EMBEDDERS[spec]
    if is_prepared(folder, model):
        return Finding(Level.OK, name, f"{spec} in {folder}")
    missing = [it for it in model.sources if installed(it.distribution) != it.version]
    if not missing:
        return Finding(Level.OK, name, f"{spec}, which the server prepares at its first start")
    size = sum(source.download_mb for source in missing)
    return Finding(
        Level.WARN,
        name,
        f"{spec} is not on this machine yet; the server fetches about {size} MB at its first "
        f"start. Where there is a network now and none then, run `memos-vllm models prepare "
        f"{spec}`; MEMOS_EMBEDDER=none searches by words only",
    )
