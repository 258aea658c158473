"""The commands of docs/weights.md, one after the other, with a small model."""

import re
import shlex

import commands
import ml_dtypes
import numpy as np
from test_convert import arrays_of, model, read

PAGE = commands.ROOT / "docs" / "weights.md"


def test_from_a_public_model_to_one_that_is_tuned_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = arrays_of("olmoe", np.dtype(ml_dtypes.bfloat16))
    model(tmp_path / "OLMoE-1B-7B", "olmoe", arrays)
    page = PAGE.read_text(encoding="utf-8")
    (first, *_), (gin,) = (
        re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "gin")
    )
    (tmp_path / "mine.gin").write_text(gin)
    said = {}
    for line in first.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "switchyard"
        done = commands.inline(*words)
        assert done.code == 0, (line, done.err)
        said[" ".join(words[:2])] = done
    assert said["generate --model_dir=runs/olmoe"].out.startswith("def main(")
    told = said["train --gin_file=runs/olmoe/config.gin"]
    assert re.search(r"loaded .*experts/up", told.out + told.err)
    tuned = read(tmp_path / "olmoe_tuned")
    assert tuned.keys() == arrays.keys()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert tuned[name].dtype == ml_dtypes.bfloat16
    assert not np.array_equal(tuned[name], arrays[name])
