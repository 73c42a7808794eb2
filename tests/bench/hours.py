"""How long do the README's runs of 8B and 1.7B take? Estimated: python tests/bench/hours.py

A step takes sampled tokens / sampling speed, and FLOPs * parameters * tokens / (MFU * peak). FLOPs for each
parameter and token: 2 forward, 4 backward, 2 for the forward pass that --gradient-checkpointing repeats;
opsd.py's teacher 2 more. The peak is an H100's, though 8B needs a card with more memory. Response lengths,
the sampling speeds and the MFU are assumptions. To measure the last two on your own card:

    python tests/bench/bench_model.py --size 1.7B

On several GPUs (--gpus) training takes an Nth of the time, unless moving weights takes longer. FSDP2 does
that while it computes. A process sends and receives for each of its micro-batches, P parameters: 4P bytes of
weights before the forward pass, 4P before the backward pass, 4P of gradients, and 4P of the teacher's
weights; (N - 1) / N of it from others. A step takes the longer of the two. The network's speed is assumed, in
GB/s and direction, for each GPU.
"""

import argparse
import math

MFU, PEAK = 0.35, 989e12  # share of the peak that training reaches (assumed); an H100's bfloat16 FLOP/s
RUNS = [  # name, parameters, FLOPs, responses a step, tokens of each, tokens/s sampled, steps
    ("OPSD 8B", 8.19e9, 10, 32, 6000, 3000, 100),
    ("RLVR 8B", 8.19e9, 8, 512, 6000, 8000, 100),
    ("RLVR 1.7B", 1.72e9, 8, 256, 600, 10_000, 100),
    ("OPSD 1.7B", 1.72e9, 10, 32, 600, 10_000, 40),
]
SEVERAL = [  # name, parameters, FLOPs, copies of the weights moved, responses, tokens of each, steps
    ("OPSD 8B", 8.19e9, 10, 4, 32, 6000, 100),
    ("RLVR 8B", 8.19e9, 8, 3, 512, 6000, 100),
]
FASTEST, TOGETHER = 100, 5000  # tokens/s sampled: of one response, and of all of a GPU's (assumed)
NETWORKS = {"NVLink": 300, "400 Gbit/s": 50, "PCIe 4": 25, "100 Gbit/s": 12.5}


def print_several_gpus(sequences):
    """Seconds of a training step by GPUs and network, in micro-batches of so many sequences."""
    networks = ", s | ".join(NETWORKS)
    print("| run | GPUs | micro-batches each | sampling, s | computing, s "
        f"| {networks}, s | hours, NVLink |")
    print("|---" * (6 + len(NETWORKS)) + "|")
    for name, parameters, flops, copies, responses, length, steps in SEVERAL:
        for count in (4, 8, 16, 32, 64):
            micros = math.ceil(responses / sequences / count)
            tokens = micros * min(sequences, responses) * length
            computing = flops * parameters * tokens / (MFU * PEAK)
            moved = micros * copies * 4 * parameters * (count - 1) / count
            moving = {network: moved / (gb * 1e9) for network, gb in NETWORKS.items()}
            sampling = max(length / FASTEST, responses * length / (count * TOGETHER))
            step = sampling + max(computing, moving["NVLink"])
            times = " | ".join(f"{seconds:.0f}" for seconds in moving.values())
            hours = steps * step / 3600
            print(f"| {name} | {count} | {micros} | {sampling:.0f} | {computing:.0f} | {times} "
                f"| {hours:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", action="store_true", help="several GPUs: computing against moving weights")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="of --gpus")
    args = parser.parse_args()
    if args.gpus:
        print_several_gpus(args.micro_batch_size)
        return
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
