"""The result of a run, in diffusers format, with a model card: it loads where flowalign is not installed."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from flowalign.config import to_dict
from flowalign.opening import plain_source

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

As it was evaluated:

```python
{code}
```

## Configuration

```yaml
{config}```

## Reference

```bibtex
{reference}
```
"""
PLAIN = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source!r}){adapter}
out = pipe(prompt={prompt!r}, {call}){comment}"""


def save_result(job: Job, folder: Folder) -> None:
    """Write what was trained, with the weights that the denoiser holds now, and the card.

    The result of an earlier end of the same run is replaced only when the new one is whole.
    """
    import yaml

    final, fresh = folder.path / "result", folder.path / "result.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    job.pipeline.save(fresh)
    config, method = job.resolved, job.config.method
    text = CARD.format(
        method=method.name, pipeline=config.pipeline, summary=method.summary.capitalize(), reward=config.reward,
        code=_code(job, str(final)), config=yaml.safe_dump(to_dict(config), sort_keys=False),
        reference=method.reference,
    )  # fmt: skip
    (fresh / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    fresh.replace(final)


def _code(job: Job, folder: str) -> str:
    """Return the lines that load the result into plain diffusers and sample as the evaluation did."""
    config = job.resolved
    base = plain_source(config.pipeline, job.judged)
    if base is None:
        return f"# the weights as {config.pipeline} saves them: {folder}"
    call = {"num_inference_steps": job.exam.steps, **config.call}
    return PLAIN.format(
        source=folder if config.lora is None else base,
        adapter="" if config.lora is None else f"\npipe.load_lora_weights({folder!r})",
        prompt=job.exam.prompts[0].text,
        call=", ".join(f"{k}={v!r}" for k, v in call.items()),
        comment="" if config.evaluation.guidance else "  # it was judged without the pipeline's guidance rule",
    )
