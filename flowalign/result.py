"""The result of a run, in diffusers format, with a model card: it loads where flowalign is not installed."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from flowalign.config import to_dict

if TYPE_CHECKING:
    from flowalign.build import Job
    from flowalign.folder import Folder

__all__ = ["save_result"]

CARD = """---
library_name: diffusers
tags: [flowalign, {method}, alignment]
---
# {pipeline} aligned by {method}

{summary}, on the reward `{reward}`. Made by [flowalign](https://github.com/flowalign/flowalign); figures, pictures
and the full configuration are in the run's `summary.json`, `report.html` and `config.yaml`.

```python
{code}
```

Sample as it was evaluated: {steps} steps{call}.

## Configuration

```yaml
{config}```

## Reference

```bibtex
{reference}
```
"""
LORA = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{pipeline}")
pipe.load_lora_weights("{folder}")"""
WHOLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")"""


def save_result(job: Job, folder: Folder) -> None:
    """Write what was trained, with the weights that the denoiser holds now, and the card.

    The result of an earlier end of the same run is replaced only when the new one is whole.
    """
    import yaml

    final, fresh = folder.path / "result", folder.path / "result.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    job.pipeline.save(fresh)
    config, method = job.config, job.config.method
    code = (WHOLE if config.lora is None else LORA).format(pipeline=config.pipeline, folder=final)
    call = "".join(f", {k}={v}" for k, v in config.call.items())
    text = CARD.format(
        method=method.name, pipeline=config.pipeline, summary=method.summary.capitalize(), reward=config.reward,
        code=code, steps=job.exam.steps, call=call, config=yaml.safe_dump(to_dict(config), sort_keys=False),
        reference=method.reference,
    )  # fmt: skip
    (fresh / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    fresh.replace(final)
