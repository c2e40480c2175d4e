"""A tiny model of texts and images, as CLIP is one, with random weights: made here, for no package brings one."""

from __future__ import annotations

import warnings
from pathlib import Path

DIMENSIONS = 8
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_clip_model(folder: Path) -> Path:
    """Save the model in sentence-transformers' form; return its directory. Needs torch and Pillow; takes some seconds."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), _START, _END]
    vocabulary = {word: number for number, word in enumerate(words)}
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = vocabulary[_END]
    config = CLIPConfig(
        text_config=layers
        | {"vocab_size": len(vocabulary), "max_position_embeddings": 77, "projection_dim": DIMENSIONS}
        | {"bos_token_id": vocabulary[_START], "eos_token_id": end, "pad_token_id": end},
        vision_config=layers | {"image_size": 8, "patch_size": 4, "projection_dim": DIMENSIONS},
        projection_dim=DIMENSIONS,
    )
    torch.manual_seed(1)
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CLIPModel(config).save_pretrained(folder / "parts")
        processor = CLIPProcessor(
            image_processor=images, tokenizer=CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=77)
        )
        processor.save_pretrained(folder / "parts")
        SentenceTransformer(modules=[Transformer(str(folder / "parts"))], device="cpu").save(str(folder / "model"))
    return folder / "model"
