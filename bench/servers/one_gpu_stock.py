"""Stock SGLang with all replicas on one GPU, for comparisons there. It takes the flags of `sglang.launch_server`.

SGLang puts each replica on the next GPU, and refuses a --gpu-id-step of 0. Here the step becomes 0 behind that check,
and nothing else changes. Each replica still takes memory as if the GPU were its own: give --max-total-tokens.
"""

from __future__ import annotations

import functools
import runpy

from sglang.srt.server_args import ServerArgs


def place_on_one_gpu() -> None:
    """Lets every replica of a server that this process starts have the first GPU."""
    check = ServerArgs.check_server_args

    @functools.wraps(check)
    def check_and_place(self: ServerArgs) -> None:
        if (self.tp_size, self.pp_size) != (1, 1):
            raise ValueError(f"--tp-size {self.tp_size} --pp-size {self.pp_size}: accepted on one GPU: 1 and 1")
        check(self)
        self.override("one_gpu_stock", gpu_id_step=0)

    ServerArgs.check_server_args = check_and_place


if __name__ == "__main__":
    place_on_one_gpu()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
