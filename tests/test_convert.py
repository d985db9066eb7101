"""Weights from one set of names to another: nothing is lost, nothing is guessed, and transformers computes the same."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launchers.convert import main as command
from tests.models import albef_batch, albef_model, batch_for
from tests.reference.compare import Folder as Reference
from tests.runs import launch, run_whole
from tests.shard_files import reference_folder
from vlscale import config, convert, weights
from vlscale.data.text import read_tokenizer
from vlscale.errors import CheckpointError, ConfigError
from vlscale.families import albef, clip, lxmert
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.objectives import answer, itm, masked_object, mlm, sigmoid
from vlscale.optim import OptimConfig
from vlscale.options import CheckpointConfig
from vlscale.saving.background import Saver
from vlscale.saving.targets import Folder
from vlscale.types import Text, Visual

SYSTEMS = {  # system: (runner that knows its sizes, tensors that the authors store and we do not)
    "albef": ("albef", 6),  # tied decoders and their biases, and position numbers, of both networks
    "tcl": ("albef", 6),
    "clip": ("clip", 0),
    "vilbert": ("vilbert", 9),  # the tied decoder; layers that the authors hold and never use
    "lxmert": ("lxmert", 1),  # the tied decoder, as in the next five
    "cvlp": ("cvlp", 1),
    "uniter": ("uniter", 1),
    "oscar": ("oscar", 1),
    "oscar_plus": ("oscar", 1),
    "vlp": ("vlp", 1),
    "videobert": ("videobert", 0),
    "cbt": ("cbt", 0),
    "univl": ("univl", 9),  # tied tables, and poolers that nobody reads
    "soho": ("soho", 24),  # and BatchNorm's counts of batches
}


def reference(system: str) -> Reference:
    return Reference.open(reference_folder(system))


def expected_sizes(system: str, folder: Reference) -> Any:
    """The family's Config by the folder's config.json."""
    sizes = importlib.import_module(f"tests.reference.{SYSTEMS[system][0]}").family_config
    extra = {"soho": (folder,), "cvlp": (folder.config, 4)}  # box numbers of a region stand in its batch
    return sizes(*extra.get(system, (folder.config,)))


def untold(sizes: Any, family: str) -> list[str]:
    """Overrides for what no tensor's shape tells."""
    told = {size.key for size in config.pick("families", family).SIZES}
    return [f"family.{key}={json.dumps(value)}" for key, value in plain(sizes).items() if key not in told]


@pytest.mark.parametrize("system", SYSTEMS)
def test_authors_weights_there_and_back(system: str, tmp_path: Path) -> None:
    folder = reference(system)
    theirs = {
        name: each for name, each in folder.tensors("weights.safetensors").items() if "visual_target_" not in name
    }
    if system == "cbt":
        theirs["text_segments.weight"] = torch.zeros(2, folder.config["hidden_size"])  # BERT's; the reference has none
    save_file(theirs, tmp_path / "authors.safetensors")
    sizes, (family, without) = expected_sizes(system, folder), SYSTEMS[system]
    ours, back = tmp_path / "ours", tmp_path / "back.safetensors"
    convert.from_published(system, str(tmp_path / "authors.safetensors"), str(ours), None, untold(sizes, family))
    tree = yaml.safe_load((ours / "config.yaml").read_text())
    assert config.family_of(tree["family"]) == (family, sizes)
    convert.into_published(system, str(ours), str(back))
    returned = load_file(back)
    assert len(returned) == len(theirs) - without
    for name, tensor in returned.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_a_converted_folder_gives_the_authors_numbers(tmp_path: Path) -> None:
    """Built again from config.yaml and model.safetensors alone, the network is the one that `fill` makes."""
    folder = reference("uniter")
    sizes = expected_sizes("uniter", folder)
    source, ours = folder.path / "weights.safetensors", tmp_path / "ours"
    convert.from_published("uniter", str(source), str(ours), None, untold(sizes, "uniter"))
    name, read = config.family_of(config.read_yaml(ours / "config.yaml")["family"])
    module = config.pick("families", name)
    made, filled = (PretrainModel(module.build(each), {}).eval() for each in (read, sizes))
    weights.init_whole(made, ours)
    weights.fill(filled, weights.read(source), module.PUBLISHED)
    batch = batch_for(sizes.inputs, sizes.vocab)
    pooled = [fused(model, batch) for model in (made, filled)]
    assert torch.equal(*pooled)


@torch.no_grad()
def fused(model: PretrainModel, batch: Any) -> Tensor:
    family = model.family
    out = family.fuse(family.encode_text(batch.text["clean"]), family.encode_visual(batch.visual["clean"]))
    assert out.pooled is not None
    return out.pooled


def plain(sizes: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sizes).items()}


def own_folder(path: Path, model: nn.Module, name: str, sizes: Any, words: tuple[str, ...] = ()) -> Path:
    """A folder under our names, as `from_published` writes it."""
    path.mkdir()
    save_file({key: value.detach().clone() for key, value in model.named_parameters()}, path / "model.safetensors")
    (path / "config.yaml").write_text(yaml.safe_dump({"family": {"name": name, **plain(sizes)}}))
    if words:
        (path / "vocab.txt").write_text("\n".join(words) + "\n")
        (path / "tokenizer.json").write_text(read_tokenizer(path / "vocab.txt"))
    return path


@torch.no_grad()
def shaken(model: PretrainModel) -> PretrainModel:
    """Every parameter far from its start, so that none can be left out unseen."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def hugging_face(name: str, folder: Path) -> Any:
    """The model of transformers; nothing of it may be missing or left over."""
    transformers = pytest.importorskip("transformers")
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("pool", ["end", "largest"])
@pytest.mark.parametrize("gelu", ["erf", "quick"])
def test_clip_in_transformers(pool: Any, gelu: Any, tmp_path: Path) -> None:
    sizes = replace(clip.tiny(), pool=pool, gelu=gelu, visual_heads=4)
    family = shaken(PretrainModel(clip.build(sizes), {})).family
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    end = 3 if pool == "end" else sizes.vocab - 1
    source = own_folder(tmp_path / "ours", nn.ModuleDict({"family": family}), "clip", sizes, words)
    convert.to_hugging_face(str(source), str(tmp_path / "hf"))
    theirs = hugging_face("CLIPModel", tmp_path / "hf")
    ids, mask = torch.randint(5, sizes.vocab - 1, (3, 9)), torch.arange(9) < torch.tensor([[9], [5], [7]])
    ids[torch.arange(3), mask.sum(dim=1) - 1] = end
    ids = ids * mask
    pixels = torch.randn(3, 3, sizes.image_size, sizes.image_size)
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels)
        text = family.encode_text(Text(ids, mask)).embed
        picture = family.encode_visual(Visual(pixels)).embed
        assert text is not None
        assert picture is not None
        torch.testing.assert_close(text, out.text_embeds)
        torch.testing.assert_close(picture, out.image_embeds)
        torch.testing.assert_close(picture @ text.T / family.temperature(), out.logits_per_image)


def siglip() -> clip.Config:
    towers = replace(clip.tiny(), gelu="tanh", norm_eps=1e-6, visual_pool="map", embed=16, text_bias=True)
    return replace(towers, causal=False, pool="last", pad=1, temperature=0.1)


def test_siglip_in_transformers_and_back(tmp_path: Path) -> None:
    sizes = siglip()
    family = clip.build(sizes)
    model = shaken(PretrainModel(family, {"sigmoid": sigmoid.build(sigmoid.Config(), family)}))
    source = own_folder(tmp_path / "ours", model, "clip", sizes)
    convert.to_hugging_face(str(source), str(tmp_path / "hf"))
    theirs = hugging_face("SiglipModel", tmp_path / "hf")
    ids = torch.randint(5, sizes.vocab, (3, sizes.text_length))
    pixels = torch.randn(3, 3, sizes.image_size, sizes.image_size)
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=pixels)
        text = family.encode_text(Text(ids, torch.ones_like(ids, dtype=torch.bool))).embed
        picture = family.encode_visual(Visual(pixels)).embed
        assert text is not None
        assert picture is not None
        logits = text @ picture.T / family.temperature() + model.get_parameter("objectives.sigmoid.bias")
        torch.testing.assert_close(logits, out.logits_per_text)
    overrides = [f"family.{key}={json.dumps(value)}" for key, value in plain(sizes).items()]
    convert.from_published("siglip", str(tmp_path / "hf"), str(tmp_path / "again"), None, overrides)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter), name


def test_a_text_tower_that_clip_of_transformers_has_not(tmp_path: Path) -> None:
    for changes, says in (
        ({"causal": False}, "reads texts causally"),
        ({"text_bias": True}, "no place for family.text_pro"),
    ):
        sizes = replace(clip.tiny(), **changes)  # type: ignore[arg-type]
        source = own_folder(tmp_path / str(changes), nn.ModuleDict({"family": clip.build(sizes)}), "clip", sizes)
        with pytest.raises(ConfigError, match=says):
            convert.to_hugging_face(str(source), str(tmp_path / "hf"))


@pytest.mark.parametrize("heads", [True, False])
def test_lxmert_in_transformers(heads: bool, tmp_path: Path) -> None:
    sizes = replace(lxmert.tiny(), dropout=0.0)
    family = lxmert.build(sizes)
    views: dict[str, Any] = {"text": "masked", "visual": "masked"}
    words = mlm.build(mlm.Config(soften=0.0, **views), family)
    pairs = itm.build(itm.Config(negatives="loader", **views), family)
    objects = masked_object.build(masked_object.Config(attribute_classes=5), family)
    answers = answer.build(answer.Config(answers=3), family)
    asked = {"mlm": words, "itm": pairs, "masked_object": objects, "answer": answers} if heads else {}
    model = shaken(PretrainModel(family, asked))
    source = own_folder(tmp_path / "ours", model, "lxmert", sizes)
    convert.to_hugging_face(str(source), str(tmp_path / "hf"))
    batch = batch_for(sizes.inputs, sizes.vocab)
    text, regions = batch.text["clean"], batch.visual["clean"]
    assert regions.mask is not None
    given = {
        "input_ids": text.ids,
        "attention_mask": text.mask.float(),
        "visual_feats": regions.feats,
        "visual_pos": regions.boxes,
        "visual_attention_mask": regions.mask.float(),
    }
    with torch.no_grad():
        ours = family.fuse(family.encode_text(text), family.encode_visual(regions))
        assert ours.text is not None
        assert ours.visual is not None
        if not heads:
            out = hugging_face("LxmertModel", tmp_path / "hf")(**given)
            torch.testing.assert_close(ours.text, out.language_output)
            torch.testing.assert_close(ours.visual, out.vision_output)
            torch.testing.assert_close(ours.pooled, out.pooled_output)
            return
        out = hugging_face("LxmertForPreTraining", tmp_path / "hf")(**given)
        torch.testing.assert_close(words.head(ours.text, family.word_embedding.weight), out.prediction_logits)
        torch.testing.assert_close(pairs.logits(ours.pooled), out.cross_relationship_score)
        torch.testing.assert_close(answers.head(ours.pooled), out.question_answering_score)


def test_albefs_text_tower_in_transformers(tmp_path: Path) -> None:
    sizes = replace(albef.tiny(), text_layers=2, dropout=0.0)
    family = shaken(PretrainModel(albef.build(sizes), {})).family
    source = own_folder(tmp_path / "ours", nn.ModuleDict({"family": family}), "albef", sizes)
    said = convert.to_hugging_face(str(source), str(tmp_path / "hf"))
    assert "family" in said[1]  # pictures and fusion are left out, and it says so
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    text = albef_batch().text["clean"]
    with torch.no_grad():
        out = theirs(input_ids=text.ids, attention_mask=text.mask.long()).last_hidden_state
        torch.testing.assert_close(family.encode_text(text).hidden, out)


def test_a_family_that_transformers_lacks(tmp_path: Path) -> None:
    sizes = config.pick("families", "uniter").tiny()
    family = config.pick("families", "uniter").build(sizes)
    source = own_folder(tmp_path / "ours", nn.ModuleDict({"family": family}), "uniter", sizes)
    with pytest.raises(ConfigError, match="no model that is family 'uniter'; it has albef, clip, lxmert"):
        convert.to_hugging_face(str(source), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def saved(out: Path, seed: int = 0, precision: str = "fp32", steps: int = 1) -> tuple[Path, PretrainModel]:
    """A run folder with checkpoints of plain PyTorch."""
    model = albef_model(seed=seed)
    engine = LocalEngine(model, OptimConfig(), torch.device("cpu"))
    saver = Saver(Folder(out / "checkpoints"), CheckpointConfig(background=False))
    for step in range(1, steps + 1):
        saver.start(step, engine.pieces(), {"step": step, "precision": precision, "engine": engine.scalars()})
    return out, model


def test_a_checkpoint_to_one_file(tmp_path: Path) -> None:
    run, model = saved(tmp_path / "run")
    for dtype, kind in ((None, torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        file = tmp_path / f"{dtype}.safetensors"
        said = convert.merge(str(run), str(file), dtype)
        assert "of step 1" in said[0]
        merged = load_file(file)
        assert set(merged) == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        for name, parameter in model.named_parameters():
            assert torch.equal(merged[name], parameter.to(kind))
        assert merged["queues.text.ids"].dtype == torch.int64


def test_a_checkpoint_into_the_authors_names(tmp_path: Path) -> None:
    run, model = saved(tmp_path / "run")
    said = convert.into_published("albef", str(run), str(tmp_path / "albef.safetensors"))
    returned, state = load_file(tmp_path / "albef.safetensors"), model.state_dict()
    assert torch.equal(
        returned["text_encoder.bert.encoder.layer.1.crossattention.self.key.weight"],
        state["family.fusion_stack.blocks.1.cross_attention.key.weight"],
    )
    assert torch.equal(returned["itm_head.weight"], state["objectives.itm.head.weight"])
    assert torch.equal(returned["text_queue"], state["queues.text.keys"].T)
    assert torch.equal(returned["temp"], state["family.temperature.value"][0])
    assert "queues.text" in said[1]
    with pytest.raises(CheckpointError, match="another family's"):
        convert.into_published("clip", str(run), str(tmp_path / "clip.safetensors"))
    assert not (tmp_path / "clip.safetensors").exists()


@pytest.mark.parametrize(
    ("precision", "dtype", "kinds"),
    [
        ("bf16", None, [torch.bfloat16]),
        ("bf16", "fp32", []),
        ("bf16", "bf16", [torch.bfloat16]),
        ("fp16", "bf16", [torch.bfloat16]),
        ("bf16", "fp16", [torch.float16]),
    ],
)
def test_a_dtype_is_rounded_to_once(
    precision: str, dtype: str | None, kinds: list[torch.dtype], tmp_path: Path
) -> None:
    """From the fp32 masters, whatever the run was trained in, and whatever the file."""
    run, model = saved(tmp_path / "run", precision=precision)
    for convert_to in (convert.merge, lambda *given: convert.into_published("albef", *given)):
        file = tmp_path / f"{convert_to.__name__}.safetensors"
        convert_to(str(run), str(file), dtype)
        wanted = model.get_parameter("objectives.itm.head.weight").detach()
        for kind in kinds:
            wanted = wanted.to(kind)
        found = load_file(file)
        (name,) = {"objectives.itm.head.weight", "itm_head.weight"} & found.keys()
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)


def test_an_older_one_is_not_taken_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = saved(tmp_path / "run", steps=2)
    file = run / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "of step 1" in convert.merge(str(run), str(tmp_path / "a.safetensors"))[0]
    convert.into_published("albef", str(run), str(tmp_path / "b.safetensors"))
    assert capsys.readouterr().err.count("has changed since it was written (its sha256 differs); going back to") == 2
    with pytest.raises(CheckpointError, match="its sha256 differs"):
        weights.read(file.parent)  # init.weights names this one


def test_only_what_a_manifest_lists_is_read(tmp_path: Path) -> None:
    run, model = saved(tmp_path / "run")
    folder = run / "checkpoints" / "step_00000001"
    (folder / "rank_00007.safetensors").write_bytes(b"of another run")
    assert set(weights.read(folder)) == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    convert.merge(str(run), str(tmp_path / "a.safetensors"))


@pytest.mark.slow
def test_fp32_masters_of_a_run_in_bf16(tmp_path: Path) -> None:
    """Two ranks: the masters are what the weights were rounded from, at every stage about the same."""
    found: dict[int, Mapping[str, Tensor]] = {}
    for stage in (0, 3):
        run, file = tmp_path / f"zero{stage}", tmp_path / f"{stage}.safetensors"
        run_whole(2, run, "--ds_config", f"ds_configs/zero{stage}.json", "steps=2", "checkpoint.every=2")
        convert.merge(str(run), str(file), "fp32")
        convert.merge(str(run), str(tmp_path / f"{stage}_trained.safetensors"))
        found[stage], rounded = load_file(file), load_file(tmp_path / f"{stage}_trained.safetensors")
        exact = weights.read(run / "checkpoints" / "step_00000002")  # as `init.weights` reads it
        assert all(torch.equal(exact[name], tensor) for name, tensor in found[stage].items())
        finer = 0
        for name, tensor in rounded.items():
            assert torch.equal(found[stage][name].to(tensor.dtype), tensor), name
            finer += not torch.equal(found[stage][name], tensor.to(found[stage][name].dtype))
        assert finer > 70  # of 77 parameters that are trained
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[3][name], tensor, atol=5e-4, rtol=0.02)


def uniter_file(tmp_path: Path, **changes: Tensor) -> tuple[str, Any]:
    """A file of the authors' names, made of our miniature; and its sizes."""
    module = config.pick("families", "uniter")
    sizes = module.tiny()
    made = weights.publish(dict(PretrainModel(module.build(sizes), {}).named_parameters()), module.PUBLISHED)
    tensors = {name: tensor.detach() for name, tensor in made.tensors.items()}
    path = tmp_path / "uniter.pt"
    torch.save({"model": {f"module.{name}": each for name, each in {**tensors, **changes}.items()}}, path)
    return str(path), sizes


def test_wrappers_are_taken_off_and_heads_carried(tmp_path: Path) -> None:
    head = {
        f"region_classifier.net.3.{part}": torch.randn(7, *more) for part, more in (("weight", (16,)), ("bias", ()))
    }
    file, sizes = uniter_file(tmp_path, **head)
    overrides = untold(sizes, "uniter")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        yaml.safe_dump({"family": {"name": "uniter"}, "objectives": {"mrc": {}, "mrc_kl": {}}, "steps": 1})
    )
    convert.from_published("uniter", file, str(tmp_path / "plain"), None, overrides)
    convert.from_published("uniter", file, str(tmp_path / "asked"), str(recipe), overrides)
    heads = [
        {n for n in load_file(tmp_path / each / "model.safetensors") if "objectives" in n}
        for each in ("plain", "asked")
    ]
    one = {f"objectives.mrc.head.decoder.{part}" for part in ("weight", "bias")}
    assert heads[0] == one
    assert heads[1] == one | {name.replace("mrc", "mrc_kl") for name in one}


def test_what_a_file_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    file, sizes = uniter_file(tmp_path)
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"16 wide, and shapes do not tell its heads; add family\.heads=NUMBER"):
        convert.from_published("uniter", file, out, None, [])
    overrides = untold(sizes, "uniter")
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        convert.from_published("uniter", file, out, None, [*overrides, "family.haeds=2"])
    with pytest.raises(ConfigError, match="'steps=3' is no size of the network"):
        convert.from_published("uniter", file, out, None, ["steps=3"])
    with pytest.raises(CheckpointError, match="has no place in this model"):
        convert.from_published("uniter", file, out, None, [*overrides, "family.layers=1"])
    with pytest.raises(ConfigError, match="--recipe quickstart is of family 'albef'"):
        convert.from_published("uniter", file, out, "quickstart", overrides)
    assert not Path(out).exists()


def test_frames_as_wide_as_words_have_heads_of_their_own(tmp_path: Path) -> None:
    file = str(reference("cbt").path / "weights.safetensors")
    asked = r"add family\.heads=NUMBER family\.cross_heads=NUMBER family\.visual_heads=NUMBER"
    with pytest.raises(ConfigError, match=asked):
        convert.from_published("cbt", file, str(tmp_path / "out"), None, [])


def test_a_tensor_that_the_system_does_not_have(tmp_path: Path) -> None:
    file, sizes = uniter_file(tmp_path, surprise=torch.ones(1))
    with pytest.raises(CheckpointError, match="'surprise' is unknown"):
        convert.from_published("uniter", file, str(tmp_path / "out"), None, untold(sizes, "uniter"))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_file_with_code_in_it(tmp_path: Path) -> None:
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    done = launch("convert", "--from", "uniter", "--weights", str(tmp_path / "evil.pt"), "--to", str(tmp_path / "out"))
    assert done.returncode == 5
    assert "code ran" not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "needs code" in done.stderr
    assert "save its state_dict with safetensors" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "one of the arguments --from --into --to-hf --merge is required"),
        (("--from", "uniterr", "--weights", "a.pt", "--to", "b"), "no system 'uniterr'; did you mean 'uniter'?"),
        (("--from", "uniter", "--to", "b"), "--from needs --weights"),
        (("--merge", "runs/x", "--to", "b.safetensors", "--recipe", "r"), "--merge has no use for --recipe"),
        (("--merge", "runs/absent", "--to", "b.safetensors"), "'runs/absent' is no folder"),
        (("--merge", "tests", "--to", "README.md"), "--to README.md should be a file whose name ends in .safetensors"),
    ],
)
def test_mistakes_in_words(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(list(arguments))
    assert says in str(caught.value)


def test_the_command_there_and_back(tmp_path: Path) -> None:
    file, sizes = uniter_file(tmp_path)
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back.safetensors")
    done = launch("convert", "--from", "uniter", "--weights", file, "--to", ours, *untold(sizes, "uniter"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "told by their shapes: vocab=64, hidden=16" in done.stdout
    with pytest.raises(ConfigError, match="is not an empty folder"):
        command(["--from", "uniter", "--weights", file, "--to", ours, *untold(sizes, "uniter")])
    assert command(["--into", "uniter", "--weights", ours, "--to", back]) == 0
    assert load_file(back).keys() == {name.removeprefix("module.") for name in torch.load(file)["model"]}
