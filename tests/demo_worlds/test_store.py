import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from flowalign.pipelines.worlds import edit, store


def test_a_shipped_world_takes_half_the_room_and_loads_in_single(tmp_path):
    torch.manual_seed(0)
    pipe = edit.build()
    store.save(pipe, tmp_path / "made")
    with pytest.raises(ValueError, match=r"no card\.json, training\.json"):
        store.ship(tmp_path / "made", "shapes-edit", tmp_path / "weights")
    for name in ("card.json", "training.json"):
        (tmp_path / "made" / name).write_text("{}")
    config = tmp_path / "made" / "vae" / "config.json"
    config.write_text(json.dumps({"_name_or_path": "/home/me/vae", **json.loads(config.read_text())}))
    folder = store.ship(tmp_path / "made", "shapes-edit", tmp_path / "weights")
    assert not any("_name_or_path" in f.read_text() for f in folder.rglob("*.json"))
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 4
    assert all(w.dtype == torch.float16 for f in files for w in load_file(f).values())
    again = DiffusionPipeline.from_pretrained(folder)
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        ours = dict(pipe.components[name].named_parameters())
        for key, p in again.components[name].named_parameters():
            assert p.dtype == torch.float32
            torch.testing.assert_close(p, ours[key], atol=1e-6, rtol=1e-3)
