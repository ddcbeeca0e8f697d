# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Reading a sweep
# Run it as a script, `python docs/notebook.py multirun/NAME`, or make a notebook of it, `jupytext --to notebook
# docs/notebook.py`. It reads any sweep; it was written for this one:
#
#     python run.py -m attn_mode=softmax,sigmoid ln_backward=exact,center_scale seed=1,2,3 diagnostics=trajectory sweep=NAME

# %%
import sys
from pathlib import Path

import lnjac
from lnjac.comparing import experiment
from lnjac.runs.merge import load
from lnjac.runs.merged import companions
from lnjac.runs.schema import FROZEN

folder = Path(sys.argv[1]) if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir() else Path("multirun/NAME")
files = companions(folder / "all.parquet")
layers, runs, curves = (load(files[table]) for table in ("layers", "runs", "curves"))
print(f"{len(runs)} runs, {len(layers)} layer rows; status: {runs['status'].value_counts().to_dict()}")

# %% [markdown]
# ## What varies
# A config column with more than one value was swept. Seeds are the unit, so compare norm by norm and seed by seed.

# %%
swept = [name for name in runs if name not in FROZEN["runs"] and runs[name].nunique(dropna=False) > 1]
levels = experiment.cell_columns(
    runs, ["ln_backward"], experiment.varying(runs)
)  # the fewest columns that tell the rest apart
print("swept:", ", ".join(swept), "| beside ln_backward and the seed, runs are told apart by:", ", ".join(levels))

# %% [markdown]
# ## How radial is the gradient at each norm, against chance?
# Chance is 1 for `enrichment_radial_share` at any width.

# %%
last = layers[layers["step"] == layers.groupby("run_id")["step"].transform("max")]
exact = last[last["ln_backward"] == "exact"]
print(exact.pivot_table("enrichment_radial_share", "site", levels, sort=False).round(2))

# %% [markdown]
# ## What does a backward cost, and does softmax pay more?
# Runs of one seed share initial weights, feedback and batches, so subtract within the seed. The frames hold every seed;
# `.rows` has the intervals, as `lnjac cost` prints them.

# %%
if {"exact"} < set(runs["ln_backward"]):
    costs = lnjac.cost(folder)
    for part in filter(None, (costs.costs, costs.differences)):
        print(part.seeds.round(4).to_string(index=False), *part.notes, sep="\n")
else:
    print("one backward alone: nothing to compare with exact")

# %% [markdown]
# ## How does σ at ln_f grow?

# %%
top = layers[layers["site"] == "ln_f"]
print(top.pivot_table("sigma_mean", "step", [*levels, "ln_backward"]).round(3))

# %% [markdown]
# ## Back to one model
# Its weights, its feedback and the batch it was analysed on.

# %%
run = lnjac.load_run(next(path.parent for path in sorted(folder.glob("*/status.json"))))
model, (idx, targets) = run.model(), run.diagnostic_batch()
_, loss = model(idx[0], targets[0])
print(run.run[[*levels, "ln_backward", "seed"]].iloc[0].to_dict(), "loss on its batch:", round(loss.item(), 4))

# %% [markdown]
# ## The radial share of a norm that is called several times
# Energies add over the calls, micro-batches and ranks of one norm at one step; ratios do not. Nothing adds over norms,
# because the norm with the most energy would decide the sum. Runs are repetitions, so take a share for each run
# and norm, and then its mean and spread over the runs of a level.

# %%
energy = exact.groupby([*levels, "site", "run_id"], sort=False, dropna=False)[["sum_B", "sum_C"]].sum()
share = energy["sum_B"] / energy.sum(axis=1)
print(share.groupby([*levels, "site"], sort=False, dropna=False).agg(["mean", "std", "count"]).round(4))
