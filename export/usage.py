"""How each format is loaded, in the engines that read it: a few lines to copy, by format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Engine(NamedTuple):
    """One way to load a folder."""

    name: str
    language: str
    code: str
    """With `{base}` for the base model and `{rank}` for the largest rank."""


class Usage(NamedTuple):
    """What a hub and a person must know of a format."""

    library: str
    """The hub's `library_name`."""
    engines: tuple[Engine, ...]


_CHAT = Engine(
    "This runtime", "sh", "edge-runtime chat --adapter path/to/this/folder     # beside the answers of the base alone"
)
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""
_ONNX = """\
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
_OPENVINO = """\
import openvino

model = openvino.Core().compile_model("path/to/this/folder/openvino_model.xml", "CPU")     # or GPU, NPU"""
_ONNX_ADAPTER = """\
import onnxruntime as ort

session = ort.InferenceSession("path/to/this/folder/model.onnx")
adapter = ort.LoraAdapter()
adapter.Load("path/to/this/folder/adapter.onnx_adapter")
options = ort.RunOptions()
options.add_active_adapter(adapter)         # another adapter, another answer: the session stays
logits = session.run(None, feeds, options)"""
_VLLM = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules personal=path/to/this/folder"

USAGE: Mapping[str, Usage] = {
    "peft": Usage("peft", (Engine("PEFT", "python", _PEFT), Engine("vLLM", "sh", _VLLM), _CHAT)),
    "native": Usage("edge-runtime", (_CHAT,)),
    "merged": Usage("transformers", (Engine("transformers", "python", _TRANSFORMERS),)),
    **dict.fromkeys(("onnx", "onnx-int8", "onnx-int4"), Usage("optimum", (
        Engine("ONNX Runtime, through optimum", "python", _ONNX),
        Engine("This runtime", "sh", "edge-runtime chat --onnx path/to/this/folder"),
    ))),
    "onnx-adapter": Usage("onnxruntime", (
        Engine("ONNX Runtime", "python", _ONNX_ADAPTER),
        Engine("This runtime", "sh", "edge-runtime chat --onnx path/to/this/folder"),
    )),
    "openvino": Usage("openvino", (Engine("OpenVINO", "python", _OPENVINO),)),
    "gguf": Usage("gguf", (
        Engine("llama.cpp", "sh", "llama-cli -m base.gguf --lora path/to/this/folder/adapter.gguf"),
        Engine("Ollama", "sh", "cd path/to/this/folder && ollama create personal -f Modelfile && ollama run personal"),
        Engine("This runtime", "sh", "edge-runtime chat --gguf path/to/this/folder"),
    )),
    "gguf-merged": Usage("gguf", (
        Engine("llama.cpp", "sh", "llama-cli -m path/to/this/folder/model.gguf"),
        Engine("Ollama", "sh", "cd path/to/this/folder && ollama create personal -f Modelfile && ollama run personal"),
        Engine("This runtime", "sh", "edge-runtime chat --gguf path/to/this/folder"),
    )),
    "mlx": Usage("mlx", (
        Engine("mlx-lm", "sh", "mlx_lm.generate --model {base} --adapter-path path/to/this/folder --prompt '…'"),
    )),
}  # fmt: skip
