"""Dense and compressed side by side: what each says about an image, how long it takes, how large it is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

HERE = Path(__file__).parent
TOP = 5


class Classifier:
    """A model named in models.json: a folder beside this file, or a repository and a commit."""

    def __init__(self, title: str, folder: str = "", repository: str = "", revision: str | None = None):
        source = str(HERE / folder) if folder else repository
        # Only the compressed checkpoint brings code, two files, and the commit of a repository is fixed in models.json.
        code = title == "Compressed"
        self.title = title
        self.processor = AutoImageProcessor.from_pretrained(source, revision=revision)
        self.model = AutoModelForImageClassification.from_pretrained(source, revision=revision, trust_remote_code=code)
        self.model.eval()
        self.mode = "L" if self.model.config.num_channels == 1 else "RGB"
        self.classify(Image.new("RGB", (64, 64)))  # the first pass is slower than all others

    @torch.inference_mode()
    def classify(self, image: Image.Image) -> tuple[dict[str, float], str]:
        """The best classes with their probabilities, and a line about time and size."""
        inputs = self.processor(image.convert(self.mode), return_tensors="pt")
        start = time.perf_counter()
        probabilities = self.model(**inputs).logits.softmax(-1)[0]
        milliseconds = 1000 * (time.perf_counter() - start)
        answers: dict[str, float] = {}
        values, labels = probabilities.topk(min(TOP, len(probabilities)))
        for value, label in zip(values.tolist(), labels.tolist(), strict=True):
            name = self.model.config.id2label[label]
            answers[f"{name} ({label})" if name in answers else name] = value  # ImageNet has two classes called crane
        return answers, f"{milliseconds:.0f} ms · {self.size()}"

    def size(self) -> str:
        parameters = list(self.model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return f"{count / 1e6:.2f} M parameters · {size / 1e6:.2f} MB"


classifiers = [Classifier(**model) for model in json.loads((HERE / "models.json").read_text(encoding="utf-8"))]


def classify(image: Image.Image | None) -> list[Any]:
    if image is None:
        raise gr.Error("Choose an image first.")
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return [part for classifier in classifiers for part in classifier.classify(upright)]


with gr.Blocks(title="Dense and compressed") as demo:
    gr.Markdown("# Dense and compressed\nThe same image, both models. Times are of this machine.")
    picture = gr.Image(type="pil", label="Image")
    button = gr.Button("Classify", variant="primary")
    outputs: list[Any] = []
    with gr.Row():
        for classifier in classifiers:
            with gr.Column():
                outputs += [gr.Label(num_top_classes=TOP, label=classifier.title), gr.Markdown(classifier.size())]
    button.click(classify, picture, outputs, api_name="classify")

if __name__ == "__main__":
    demo.launch()
