"""What survives of a medium whose writing is interrupted: its beginning, in a folder, for another run to go on from."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av

# Presentation time, decoding time, duration, bytes that follow, and whether it is a key frame.
HEADER = struct.Struct("<qqqI?")
# Bytes read at a time to check a log.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Keep:
    """So many frames from the beginning, in a folder of their own: packets of a video, or images."""

    folder: Path
    frames: int = 0
    bytes: int = 0  # of the packets or images
    checksum: int = 0  # CRC-32 of those bytes

    @property
    def packets(self) -> Path:
        return self.folder / "packets"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def is_whole(self, files: Iterable[Path]) -> bool:
        """Whether all of it is still in these files, one after another."""
        checksum, missing = 0, self.bytes
        for path in files:
            with path.open("rb") as file:
                while missing and (block := file.read(min(BLOCK, missing))):
                    checksum, missing = zlib.crc32(block, checksum), missing - len(block)
        return not missing and checksum == self.checksum


class PacketLog:
    """Packets of one video stream, appended in the order in which an encoder gives them.

    So many of them as there are, they can be decoded. But encoders put frames into another order: only where those that
    are there are all up to some time are they a clip's beginning. `kept` is the longest so far.
    """

    def __init__(self, kept: Keep) -> None:
        """Open a log to go on after what an earlier run kept; if that is nothing, a new one."""
        self.kept = kept
        self._frames, self._bytes, self._checksum = kept.frames, kept.bytes, kept.checksum
        self._expected: deque[int] = deque()  # times of the frames that the encoder has not given back in order
        self._early: set[int] = set()  # times of those that it has given back before an earlier one
        self._file = kept.packets.open("r+b" if kept.frames else "wb")
        self._file.truncate(kept.bytes)
        self._file.seek(kept.bytes)

    def expect(self, pts: int) -> None:
        """A frame of this time, later than all before it, goes into the encoder."""
        self._expected.append(pts)

    def append(self, packet: av.Packet) -> None:
        """Write down a packet that has come out of it."""
        header = HEADER.pack(packet.pts, packet.dts, packet.duration, packet.size, packet.is_keyframe)
        for part in (header, memoryview(packet)):
            self._file.write(part)
            self._bytes += len(part)
            self._checksum = zlib.crc32(part, self._checksum)
        self._early.add(packet.pts)
        while self._expected and self._expected[0] in self._early:
            self._early.remove(self._expected.popleft())
            self._frames += 1
        if not self._early:
            self.kept = replace(self.kept, frames=self._frames, bytes=self._bytes, checksum=self._checksum)

    def flush(self) -> None:
        """Have all of it on disk: what follows may be the end of this process, or of power."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
        elif self.kept.packets.stat().st_size < self.kept.bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # which nobody was told when it was closed

    def close(self) -> None:
        self._file.close()


def packets_of(kept: Keep, time_base: Fraction) -> Iterator[av.Packet]:
    """The packets that were kept, to be written into a container. `time_base`: seconds, of their encoder's clock."""
    if not kept.bytes:
        return
    with kept.packets.open("rb") as file:
        while file.tell() < kept.bytes:
            pts, dts, duration, size, is_keyframe = HEADER.unpack(file.read(HEADER.size))
            packet = av.Packet(file.read(size))
            packet.pts, packet.dts, packet.duration, packet.time_base = pts, dts, duration, time_base
            packet.is_keyframe = is_keyframe
            yield packet
