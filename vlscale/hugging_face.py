"""Families that `transformers` has a class for: how it names their tensors, and its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlscale.errors import ConfigError
from vlscale.families import albef, clip, lxmert
from vlscale.families.base import Rename, Renames

GELU = {"erf": "gelu", "quick": "quick_gelu", "tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Form:
    """One family as `transformers` has it."""

    renames: Renames  # names to ours
    covers: str  # regular expression: our tensors that its class has
    # (Config, our tensors, id of the token that ends a text) -> config.json, which names the class
    config: Callable[[Any, Mapping[str, Tensor], int], dict[str, Any]]
    instead: tuple[str, str] = ("", "")  # how names of the table begin, and how theirs do

    def named(self, name: str) -> str:
        """Their name for a name of the table."""
        old, new = self.instead
        return new + name.removeprefix(old) if name.startswith(old) else name


def _clip_blocks(source: str, ours: str) -> list[Rename]:
    """Rows for one tower's blocks, where query, key and value are three."""
    theirs, block = rf"{source}\.encoder\.layers\.(\d+)\.", rf"family.{ours}.blocks.\1."
    fused = (block + r"attention.qkv.\2",)
    parts = (Rename(theirs + rf"self_attn\.{name}_proj\.(\w+)", fused, part=(i, 3)) for i, name in enumerate("qkv"))
    return [
        *parts,
        Rename(theirs + r"self_attn\.out_proj\.(\w+)", (block + r"attention.output.\2",)),
        Rename(theirs + r"layer_norm1\.(\w+)", (block + r"attention_norm.\2",)),
        Rename(theirs + r"layer_norm2\.(\w+)", (block + r"mlp_norm.\2",)),
        Rename(theirs + r"mlp\.(fc1|fc2)\.(\w+)", (block + r"mlp.\2.\3",)),
    ]


def _clip_rows() -> list[Rename]:
    def row(source: str, target: str, back: Callable[[Tensor], Tensor] | None = None) -> Rename:
        return Rename(source, (f"family.{target}",), back=back)

    seen, read = r"vision_model\.embeddings\.", r"text_model\.embeddings\."
    return [
        row(seen + "class_embedding", "image_encoder.tokens.class_token", torch.flatten),
        row(seen + r"position_embedding\.weight", "image_encoder.tokens.positions", lambda table: table[0]),
        row(seen + r"patch_embedding\.weight", "image_encoder.patches.projection.weight"),
        row(r"vision_model\.pre_layrnorm\.(\w+)", r"image_encoder.pre_norm.\1"),  # their spelling
        *_clip_blocks("vision_model", "image_encoder.stack"),
        row(r"vision_model\.post_layernorm\.(\w+)", r"image_encoder.norm.\1"),
        row(r"visual_projection\.weight", "visual_proj.weight"),
        row(read + r"token_embedding\.weight", "text_tokens.word.weight"),
        row(read + r"position_embedding\.weight", "text_tokens.positions.weight"),
        *_clip_blocks("text_model", "text_stack"),
        row(r"text_model\.final_layer_norm\.(\w+)", r"text_norm.\1"),
        row(r"text_projection\.weight", "text_proj.weight"),
        row("logit_scale", "temperature.value", lambda value: value.reshape(())),
    ]


def _clip(config: clip.Config, tensors: Mapping[str, Tensor], end_token: int) -> dict[str, Any]:
    """CLIPModel reads a text at its first `eos_token_id`, but at its largest id where that is 2 (modeling_clip.py).

    Raises:
        ConfigError: a text tower that is not CLIP's.
    """
    if not config.causal:
        raise ConfigError("CLIPModel of transformers reads texts causally, and this network does not (family.causal)")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed,
        "text_config": {
            **_text_tower(config),
            "projection_dim": config.embed,
            "eos_token_id": 2 if config.pool == "largest" else end_token,
        },
        "vision_config": {**_image_tower(config), "projection_dim": config.embed},
    }


def _siglip(config: clip.Config, tensors: Mapping[str, Tensor], end_token: int) -> dict[str, Any]:
    """SiglipModel reads a text at its last place, whatever stands there."""
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {**_text_tower(config), "projection_size": config.embed},
        "vision_config": _image_tower(config),
    }


def _text_tower(config: clip.Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.text_length,
        "hidden_act": GELU[config.gelu],
        "layer_norm_eps": config.norm_eps,
    }


def _image_tower(config: clip.Config) -> dict[str, Any]:
    return {
        "hidden_size": config.visual_width,
        "intermediate_size": config.visual_intermediate,
        "num_hidden_layers": config.visual_layers,
        "num_attention_heads": config.visual_heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "hidden_act": GELU[config.gelu],
        "layer_norm_eps": config.norm_eps,
    }


def _bert(config: Any, layers: int) -> dict[str, Any]:
    """What the configurations of BERT and of its descendants have alike."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.segments,
    }


def _albef(config: albef.Config, tensors: Mapping[str, Tensor], end_token: int) -> dict[str, Any]:
    """The text tower alone; pictures and fusion have no class there."""
    return {"architectures": ["BertModel"], "model_type": "bert", **_bert(config, config.text_layers)}


def _lxmert(config: lxmert.Config, tensors: Mapping[str, Tensor], end_token: int) -> dict[str, Any]:
    """LxmertForPreTraining where all its heads are there, else the network alone."""
    counted = {
        "num_object_labels": "masked_object.head.decoders.objects.bias",
        "num_attr_labels": "masked_object.head.decoders.attributes.bias",
        "num_qa_labels": "answer.head.decoder.bias",
    }
    others = ("mlm.head.bias", "itm.head.bias", "masked_object.head.decoders.features.bias")
    whole = all(f"objectives.{name}" in tensors for name in (*counted.values(), *others))
    labels = {key: len(tensors[f"objectives.{name}"]) for key, name in counted.items() if whole}
    return {
        "architectures": ["LxmertForPreTraining" if whole else "LxmertModel"],
        "model_type": "lxmert",
        **_bert(config, config.text_layers),
        "l_layers": config.text_layers,
        "r_layers": config.visual_layers,
        "x_layers": config.cross_layers,
        "visual_feat_dim": config.feats,
        "visual_pos_dim": config.boxes,
        **labels,
    }


ALBEF = Form(albef.PUBLISHED, r"family\.(?:text_embeddings|text_stack)\..*", _albef, instead=("text_encoder.bert.", ""))
CLIP = Form(Renames(tuple(_clip_rows())), r"family\..*", _clip)
SIGLIP = Form(clip.SIGLIP, r"family\..*|objectives\.sigmoid\.bias", _siglip)
LXMERT = Form(lxmert.PUBLISHED, r"(?:family|objectives)\..*", _lxmert, instead=("bert.", "lxmert."))

FORMS: dict[str, Callable[[Any], Form]] = {  # by family, of its Config
    "albef": lambda config: ALBEF,
    "clip": lambda config: SIGLIP if config.visual_pool == "map" else CLIP,
    "lxmert": lambda config: LXMERT,
}
