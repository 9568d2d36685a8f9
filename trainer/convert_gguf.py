"""`python -m trainer.convert_gguf SRC.gguf DEST`: a quantised GGUF file as an ordinary model folder.

The weights are dequantised to bfloat16 and written as safetensors with config, tokenizer and chat
template, so that every loader of Hugging Face folders (transformers, peft, vLLM) takes the result.
DEST must not exist; the folder is whole once the process exits 0.
"""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

logger = logging.getLogger("trainer.convert_gguf")


def convert(source: Path, destination: Path) -> None:
    """Write the model of `source` to the new folder `destination`.

    Raises FileNotFoundError, FileExistsError, and ValueError when the file has no chat template
    or the architecture is not one that transformers reads from GGUF.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no GGUF file at {source}")
    if destination.exists():
        raise FileExistsError(f"{destination} exists")
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        _write(source, staging)
        staging.rename(destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{source} carries no chat template")
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A model loaded from GGUF refuses save_pretrained ("not serializable"); a fresh one does not.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class name that the GGUF reader leaves behind is unknown to other loaders.
    description_file = folder / "tokenizer_config.json"
    description = json.loads(description_file.read_text())
    description["tokenizer_class"] = "PreTrainedTokenizerFast"
    description_file.write_text(json.dumps(description, indent=2, ensure_ascii=False))
    # save_pretrained writes the weights readable by their owner only; mkdtemp does so for the folder.
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if len(arguments) != 2:
        print("usage: python -m trainer.convert_gguf SRC.gguf DEST", file=sys.stderr)
        return 64
    source, destination = Path(arguments[0]), Path(arguments[1])
    try:
        convert(source, destination)
    except (OSError, ValueError) as error:
        logger.error("conversion of %s failed: %s", source, error)
        return 65
    logger.info("wrote %s", destination)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
