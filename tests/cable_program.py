"""A process that moves Ethernet frames between two TAP devices, both ways: holds each for a while, and loses some.

Its arguments are the two descriptors and a number that chance begins with. Each line of its input says from now on how
many seconds a frame is held, and the share of those that are lost; the answer is how many have been passed on and lost
so far. It ends with its input.
"""

from __future__ import annotations

import heapq
import os
import random
import selectors
import sys
import time

_LONGEST_FRAME = 65536  # more than any device has
_AT_ONCE = 64  # frames of one end before the other end has its turn


def run(ends: tuple[int, int], chance: random.Random) -> None:
    delay_s = loss = 0.0
    taken = passed_on = lost = 0
    held: list[tuple[float, int, int, bytes]] = []  # when it is due, which it was, where it goes
    orders = sys.stdin.fileno()
    selector = selectors.DefaultSelector()  # select() takes no descriptor above 1023
    selector.register(orders, selectors.EVENT_READ)
    for end in ends:
        os.set_blocking(end, False)
        selector.register(end, selectors.EVENT_READ)
    while True:
        wait_s = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready = {key.fd for key, _ in selector.select(wait_s)}
        now_s = time.monotonic()
        for end, other in (ends, ends[::-1]):
            for _ in range(_AT_ONCE if end in ready else 0):
                try:
                    frame = os.read(end, _LONGEST_FRAME)
                except BlockingIOError:
                    break
                if chance.random() < loss:
                    lost += 1
                else:
                    taken += 1
                    heapq.heappush(held, (now_s + delay_s, taken, other, frame))
        while held and held[0][0] <= now_s:
            _, _, end, frame = heapq.heappop(held)
            os.write(end, frame)
            passed_on += 1
        if orders in ready:
            line = os.read(orders, 1024)
            if not line:
                return
            if line.strip():
                delay_s, loss = map(float, line.split())
            print(passed_on, lost, flush=True)


if __name__ == "__main__":
    run((int(sys.argv[1]), int(sys.argv[2])), random.Random(int(sys.argv[3])))
