"""docs/frameworks.md: its code runs as it stands, and what its callbacks record is what `measure` finds."""

import re
import runpy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from support.pages import blocks
from support.paths import ROOT
from torch import Tensor, nn

import lnjac

transformers = pytest.importorskip("transformers", reason="needs the extra [zoo]: make test-zoo installs it")
lightning = pytest.importorskip("lightning", reason="needs the extra [zoo]: make test-zoo installs it")
pytest.importorskip("timm", reason="needs the extra [zoo]: make test-zoo installs it")
pytest.importorskip("accelerate", reason="needs the extra [zoo]: make test-zoo installs it")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PAGE = ROOT / "docs" / "frameworks.md"
LAST = "model.norm"
NORMS = [f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")] + [LAST]
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
Space = dict[str, Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    """All that the page's blocks define, each having run in turn, and the rows that each left in `table`."""
    space: Space = {"tables": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(space.setdefault("folder", tmp_path_factory.mktemp("page")))
        torch.manual_seed(0)
        for code in blocks(PAGE, "python"):
            exec(code, space)
            if "table = " in code:
                space["tables"].append(space["table"])
        yield space


def assert_rows_equal(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Compare all measured columns but the residuals, which are roundings."""
    expected = expected.set_index(["site", "call"]).sort_index()
    found = found.set_index(["site", "call"]).sort_index()
    assert found.index.tolist() == expected.index.tolist()
    for name in expected.select_dtypes("number"):
        if name.endswith("_residual"):
            assert found[name].max() < 1e-5
        else:
            near = pytest.approx(expected[name].astype(float).tolist(), rel=1e-4, abs=1e-9, nan_ok=True)
            assert found[name].astype(float).tolist() == near, name


# the page as it stands


def test_a_causal_models_norms_are_measured(page: Space) -> None:
    whole, padded = page["tables"][:2]
    assert whole["site"].tolist() == NORMS
    assert set(whole["n_tokens"]) == {4 * 16}
    assert set(padded["n_tokens"]) == {16 + 12 + 9 + 5}


def test_the_batchs_targets_are_one_fewer_in_each_sequence(page: Space) -> None:
    ids = torch.randint(64, (3, 7))
    batch = {"input_ids": ids, "labels": ids}
    model = page["llama"]()
    mean, tokens = page["loss"](model, batch)
    logits = model(input_ids=ids).logits[:, :-1]
    summed = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert tokens == 3 * 6
    torch.testing.assert_close(mean * tokens, summed)


def test_padding_changes_no_row_of_the_real_tokens(page: Space) -> None:
    model, loss, ids = page["llama"](), page["loss"], torch.randint(64, (2, 9))
    real = torch.arange(14) < torch.full((2, 1), 9)
    longer = F.pad(ids, (0, 5))
    padded = {"input_ids": longer, "attention_mask": real.long(), "labels": longer.masked_fill(~real, -100)}
    bare = lnjac.probe(model).measure([{"input_ids": ids, "labels": ids}], loss)
    masked = lnjac.probe(model).measure([padded], loss, mask=lambda batch: batch["attention_mask"].bool())
    assert_rows_equal(masked, bare)
    unmasked = lnjac.probe(model).measure([padded], loss)
    assert set(unmasked["n_tokens"]) == {28}
    assert (unmasked["sigma_mean"] / bare["sigma_mean"] - 1).abs().min() > 1e-4


@pytest.mark.parametrize(("name", "norms"), [("transformers", NORMS), ("lightning", ["net.1"])])
def test_a_trainers_run_is_recorded(page: Space, name: str, norms: list[str]) -> None:
    merged = lnjac.merge(f"runs/{name}-seed1", f"{name}.parquet")
    assert merged is not None
    layers = pd.read_parquet(f"{name}.parquet")
    assert layers[["step", "site"]].values.tolist() == [[step, site] for step in (0, 2) for site in norms]
    assert set(layers["trainer"]) == {name}
    assert layers["loss_nats"].between(1, 5).all()
    runs = pd.read_parquet(f"{name}.runs.parquet")
    assert runs["status"].tolist() == ["done"]
    assert runs["train_loss_nats"].between(1, 5).all()


def test_timms_norms_are_all_measured(page: Space) -> None:
    for model, found in ((page["vit"], page["vit_table"]), (page["convnext"], page["convnext_table"])):
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
        assert set(found["site"]) == set(norms)
        assert found["jacobian_residual"].max() < 1e-5
        assert found["d"].tolist() == [norms[site].weight.numel() for site in found["site"]]
    downsampled = page["convnext_table"].set_index("site")["n_tokens"]
    assert downsampled["stem.1"] == 4 * (32 // 4) ** 2


# checkpoints: each row of own-model.md's table


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12).view(2, 6)).logits


def restored(page: Space, load: Callable[[nn.Module], nn.Module], saved: nn.Module, **more: Any) -> None:
    """Loading gives a new model the saved one's outputs."""
    fresh = page["llama"](**more)
    assert not torch.equal(logits(fresh), logits(saved))
    assert torch.equal(logits(load(fresh)), logits(saved))


def loaded_from(file: str, prefix: str = "") -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        model.load_state_dict({name.removeprefix(prefix): value for name, value in load_file(file).items()})
        return model

    return load


def test_a_state_dict_is_restored(page: Space) -> None:
    saved = page["llama"]()
    save_file(saved.state_dict(), "plain.safetensors")
    restored(page, loaded_from("plain.safetensors"), saved)


def test_tied_weights_are_restored_by_load_model_alone(page: Space) -> None:
    saved = page["llama"](tie_word_embeddings=True)
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(saved.state_dict(), "shared.safetensors")
    save_model(saved, "tied.safetensors")

    def load(model: nn.Module) -> nn.Module:
        load_model(model, "tied.safetensors")
        return model

    restored(page, load, saved, tie_word_embeddings=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded_from("tied.safetensors")(page["llama"](tie_word_embeddings=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(page["llama"](), "tied.safetensors")


def test_a_compiled_models_weights_are_restored(page: Space) -> None:
    saved = page["llama"]()
    save_file(torch.compile(saved).state_dict(), "compiled.safetensors")
    restored(page, loaded_from("compiled.safetensors", "_orig_mod."), saved)
    into = page["llama"]()
    loaded_from("compiled.safetensors")(torch.compile(into))
    assert torch.equal(logits(into), logits(saved))
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*_orig_mod"):
        loaded_from("compiled.safetensors")(page["llama"]())


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_transformers_is_restored(page: Space, tied: bool) -> None:
    saved = page["llama"](tie_word_embeddings=tied)
    saved.save_pretrained(f"saved-{tied}")
    same, report = transformers.AutoModelForCausalLM.from_pretrained(f"saved-{tied}", output_loading_info=True)
    assert torch.equal(logits(same), logits(saved))
    assert not report["missing_keys"]


def test_from_pretrained_names_what_the_folder_lacks(page: Space) -> None:
    """It goes on with random values, which is why the page has the assertion."""
    page["llama"]().model.save_pretrained("headless")
    _, report = transformers.LlamaForCausalLM.from_pretrained("headless", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}


def test_a_load_that_is_not_strict_measures_a_random_model(page: Space) -> None:
    """Which is what both pages warn of."""
    ids = torch.randint(64, (2, 8))
    batch, saved = {"input_ids": ids, "labels": ids}, page["llama"]()
    save_file(torch.compile(saved).state_dict(), "lax.safetensors")
    lax = page["llama"]()
    before = lnjac.probe(lax).measure([batch], page["loss"])
    lax.load_state_dict(load_file("lax.safetensors"), strict=False)
    assert_rows_equal(lnjac.probe(lax).measure([batch], page["loss"]), before)
    assert lnjac.probe(saved).measure([batch], page["loss"])["loss_nats"][0] != before["loss_nats"][0]


# transformers' Trainer


def sequences(n: int = 32) -> list[dict[str, Tensor]]:
    """Right-padded sequences of 16, of 3 to 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for ids in torch.randint(64, (n, 16), generator=generator):
        real = torch.arange(16) < int(torch.randint(3, 17, (), generator=generator))
        found.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)})
    return found


def training(page: Space, callbacks: list[Any], accumulate: int, **more: Any) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = page["llama"]()
    settings = transformers.TrainingArguments(
        "trained",
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    transformers.Trainer(model, settings, train_dataset=sequences(), callbacks=callbacks).train()
    return model


class Keep(transformers.TrainerCallback):
    """Keep the weights before each update, and the batches of it."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.batches: dict[int, list[dict[str, Tensor]]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        here = self.batches[state.global_step] = []
        if state.global_step == 0:
            self.handle = model.register_forward_pre_hook(
                lambda _, args, batch: self.now.append(batch), with_kwargs=True
            )
        self.now = here

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.handle.remove()


NAMES = ("input_ids", "attention_mask", "labels")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_transformers_trainer_records_what_measure_finds(
    page: Space, tmp_path: Path, accumulate: int, clip: float
) -> None:
    kept = Keep()
    with lnjac.record(tmp_path / "run", config={"of": "test"}, seed=1) as run, ExitStack() as stack:
        training(page, [kept, page["Watch"](run, stack, every=2)], accumulate, max_grad_norm=clip)
    layers = pd.read_parquet(tmp_path / "run" / "layers.parquet")
    assert set(layers["step"]) == {0, 2}
    model = page["llama"]()
    for step, found in layers.groupby("step"):
        assert len(kept.batches[step]) == accumulate
        model.load_state_dict(kept.weights[step])
        batches = [{name: batch[name] for name in NAMES} for batch in kept.batches[step]]
        expected = lnjac.probe(model).measure(batches, page["loss"], mask=lambda batch: batch["attention_mask"].bool())
        assert_rows_equal(found[expected.columns], expected)


def test_a_watched_training_is_the_training(page: Space, tmp_path: Path) -> None:
    with lnjac.record(tmp_path / "run", config={"of": "test"}, seed=1) as run, ExitStack() as stack:
        watched = training(page, [page["Watch"](run, stack, every=2)], 2)
    for p, q in zip(watched.parameters(), training(page, [], 2).parameters(), strict=True):
        assert torch.equal(p, q)


class Stop(transformers.TrainerCallback):
    def on_substep_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("stopped")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_error_in_training_leaves_no_hook(page: Space, tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    class See(Stop):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            seen.append(model)
            assert hooks(model) > 0

    with (
        pytest.raises(RuntimeError, match="stopped"),
        lnjac.record(tmp_path / "run", config={"of": "test"}, seed=1) as run,
        ExitStack() as stack,
    ):
        training(page, [page["Watch"](run, stack, every=2), See()], 2)
    assert hooks(seen[0]) == 0


# Lightning's Trainer


class KeepLightning(lightning.Callback):
    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.batches: dict[int, list[Any]] = {}

    def on_train_batch_start(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        self.weights.setdefault(trainer.global_step, weights)
        self.batches.setdefault(trainer.global_step, []).append(batch)


def fitted(page: Space, callbacks: list[Any], accumulate: int) -> nn.Module:
    torch.manual_seed(1)
    module: nn.Module = page["Classifier"]()
    lightning.Trainer(
        max_steps=4,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.1,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, page["loader"])
    return module


def images_of(batch: Any) -> int:
    return len(batch[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightnings_trainer_records_what_measure_finds(page: Space, tmp_path: Path, accumulate: int) -> None:
    kept = KeepLightning()
    with lnjac.record(tmp_path / "run", config={"of": "test"}, seed=1) as run, ExitStack() as stack:
        watch = page["WatchLightning"](run, stack, every=2, tokens=images_of)
        trained = fitted(page, [kept, watch], accumulate)
    layers = pd.read_parquet(tmp_path / "run" / "layers.parquet")
    assert set(layers["step"]) == {0, 2}
    module = page["Classifier"]()
    for step, found in layers.groupby("step"):
        assert len(kept.batches[step]) == accumulate
        module.load_state_dict(kept.weights[step])
        expected = lnjac.probe(module).measure(
            kept.batches[step], lambda module, batch: (module.training_step(batch, 0), images_of(batch))
        )
        assert_rows_equal(found[expected.columns], expected)
    for p, q in zip(trained.parameters(), fitted(page, [], accumulate).parameters(), strict=True):
        assert torch.equal(p, q)
    assert hooks(trained) == 0


# the script


def test_the_script_finds_the_pages_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "tiny_llama.py"))["main"]
    main(tmp_path)
    found, (shown,) = capsys.readouterr().out, blocks(PAGE, "text")
    assert NUMBER.sub("#", found) == NUMBER.sub("#", shown)
    near = [pytest.approx(float(number), abs=0.3) for number in NUMBER.findall(shown)]
    assert [float(number) for number in NUMBER.findall(found)] == near
    losses = pd.read_parquet(tmp_path / "all.runs.parquet").pivot(
        index="seed", columns="ln_backward", values="val_loss_nats"
    )
    costs = losses["center_scale"] - losses["exact"]
    assert f"cost {costs.mean():+.4f} nats" in found
    layers = pd.read_parquet(tmp_path / "all.parquet")
    declared = layers[layers["ln_backward"] == "center_scale"].groupby("site")["site_backward"].unique()
    assert {site: list(names) for site, names in declared.items()} == {
        site: ["center_scale" if site == LAST else "exact"] for site in NORMS
    }
    main(tmp_path)  # finished runs are kept
    assert capsys.readouterr().out == found
