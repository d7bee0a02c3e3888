#!/usr/bin/env bash
# Flow-GRPO on Stable Diffusion 3.5 Medium with PickScore, at the published settings (arXiv 2505.05470; KL weight .01),
# but for bf16 in place of fp16: the published code scales its fp16 loss, which flowalign does not do.
#
# NOT RUN by the authors of flowalign: it needs a large GPU and weights of the hub (accept the model's licence there, and
# log in with `hf auth login`). The paper used 32 GPUs and thousands of iterations; one GPU does the same updates, slower.
# The published rollout and update batch is 9 samples; --chunk keeps both at that size, so that the first ratio is one.
#
#   scripts/sd35_pickscore.sh prompts.txt runs/sd35-pickscore [further options]
set -euo pipefail
prompts="${1:?a text file with one prompt a line}"
output="${2:?a folder for the run}"
shift 2
exec flowalign train flow-grpo --preset published \
    --pipeline stabilityai/stable-diffusion-3.5-medium --call height 512 width 512 guidance_scale 4.5 \
    --reward pickscore --prompts "$prompts" --output "$output" \
    --precision bf16 --device cuda --chunk 9 \
    --evaluation.images 200 --evaluation.steps 40 --evaluation.batch 9 --evaluation.rewards "pickscore, aesthetic, imagereward" \
    --fit.checkpoint-every 10 "$@"
