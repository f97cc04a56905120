"""KV pages after a load are, bit for bit, those of the bake; whatever the ISA and block size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model

pytestmark = pytest.mark.server

_PROBE = Path(__file__).with_name("page_probe.py")
_PROBE_SECONDS = 600
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Lets the probe send the functions that read pages to the worker.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_PLUGINS": "memos",
}

# (model, dtype, block size)
CASES = [
    ("smollm2", "bfloat16", 128),
    ("head_dim_64", "bfloat16", 32),
    ("head_dim_64", "float16", 128),
    ("head_dim_64", "float16", 32),
    ("head_dim_64", "float32", 128),
    ("head_dim_64", "float32", 32),
    ("head_dim_80", "bfloat16", 128),
    ("head_dim_80", "float32", 32),
]

Findings = dict[str, Any]


@pytest.fixture(scope="module")
def findings(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], Findings]:
    """What the probe found in each case, all in one process of its own."""
    folder = tmp_path_factory.mktemp("pages")
    models = {"smollm2": model_folder}
    for head_dim in (64, 80):
        name = f"head_dim_{head_dim}"
        models[name] = tiny_model("llama", folder / name, tokenizer=model_folder, head_dim=head_dim)
    cases = [
        {
            "model": str(models[model]),
            "dtype": dtype,
            "block_size": block_size,
            "data_dir": str(folder / f"{model}-{dtype}-{block_size}"),
        }
        for model, dtype, block_size in CASES
    ]
    with (folder / "probe.log").open("w") as log:
        probe = subprocess.run(
            [sys.executable, str(_PROBE)],
            input=json.dumps(cases),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **_ENVIRONMENT},
            timeout=_PROBE_SECONDS,
            check=False,
        )
    assert probe.returncode == 0, (folder / "probe.log").read_text()[-4000:]
    lines = [line for line in probe.stdout.splitlines() if line.startswith("FINDINGS ")]
    return {
        case: json.loads(line.removeprefix("FINDINGS "))
        for case, line in zip(CASES, lines, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_pages_after_a_load_are_those_of_the_bake(
    case: tuple[str, str, int], findings: dict[tuple[str, str, int], Findings]
) -> None:
    found = findings[case]
    assert found["sources"] == ["computed", "store", "store", "store"]
    # The load went elsewhere, and nothing of the bake was left where it had been.
    assert found["loaded_blocks"] != found["baked_blocks"]
    for baked, scribbled in zip(found["baked"], found["scribbled"], strict=True):
        assert not set(baked) & set(scribbled)
    assert found["loaded"] == found["baked"]
    assert found["same_tokens"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_load_that_continues_another_gives_the_same_pages(
    case: tuple[str, str, int], findings: dict[tuple[str, str, int], Findings]
) -> None:
    found = findings[case]
    assert [len(blocks) for blocks in found["split_blocks"]] == [1, 2]
    assert found["split"] == found["baked"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_artifact_holds_the_kv_of_the_exported_pages(
    case: tuple[str, str, int], findings: dict[tuple[str, str, int], Findings]
) -> None:
    """vLLM's own packing op, given the artifact, writes the very pages that were exported."""
    assert findings[case]["artifact"] == findings[case]["baked"]


def test_the_cases_cover_every_packing_of_this_machine(
    findings: dict[tuple[str, str, int], Findings],
) -> None:
    isas = {found["isa"] for found in findings.values()}
    assert {"vec", "vec16"} <= isas
