"""How long do the README's runs of 8B and 1.7B take? Estimated: python tests/bench/hours.py

A step takes sampled tokens / sampling speed, and FLOPs * parameters * tokens / (MFU * peak). FLOPs for each
parameter and token: 2 forward, 4 backward, 2 for the forward pass that --gradient-checkpointing repeats;
opsd.py's teacher 2 more. The peak is an H100's, though 8B needs a card with more memory. Response lengths,
the sampling speeds and the MFU are assumptions. To measure the last two on your own card:

    python tests/bench/bench_model.py --size 1.7B
"""

import argparse

MFU, PEAK = 0.35, 989e12  # share of the peak that training reaches (assumed); an H100's bfloat16 FLOP/s
RUNS = [  # name, parameters, FLOPs, responses a step, tokens of each, tokens/s sampled, steps
    ("OPSD 8B", 8.19e9, 10, 32, 6000, 3000, 100),
    ("RLVR 8B", 8.19e9, 8, 512, 6000, 8000, 100),
    ("RLVR 1.7B", 1.72e9, 8, 256, 600, 10_000, 100),
    ("OPSD 1.7B", 1.72e9, 10, 32, 600, 10_000, 40),
]


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print("| run | tokens a step | assumed tokens/s | sampling, s | training, s | steps | in all |")
    print("|---|---|---|---|---|---|---|")
    for name, parameters, flops, responses, length, speed, steps in RUNS:
        tokens = responses * length
        sampling = tokens / speed
        training = flops * parameters * tokens / (MFU * PEAK)
        minutes = steps * (sampling + training) / 60
        in_all = f"{minutes / 60:.0f} hours" if minutes >= 60 else f"{minutes:.0f} minutes"
        print(f"| {name} | {responses} x {length:,} | {speed:,} | {sampling:.0f} | {training:.0f} | {steps} "
            f"| {in_all} |")


if __name__ == "__main__":
    main()
