"""Short clips for tests, cut from real ones."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av


def cut(source: Path, target: Path, frames: int, height: int | None = None) -> Path:
    """Write the first frames of a video with the sound that belongs to them, encoded again as H.264 and AAC.

    Args:
        source: the video.
        target: where the short one goes, an .mp4.
        frames: how many.
        height: of the short one, even; None keeps the size. The width is made even too.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        seen = reader.streams.video[0]
        rate = Fraction(seen.average_rate or 25)
        video = writer.add_stream("libx264", rate=rate, options={"crf": "20"})
        video.height = height or seen.height
        video.width = 2 * round(seen.width * video.height / seen.height / 2)
        video.pix_fmt = "yuv420p"
        audio = None
        if heard := next(iter(reader.streams.audio), None):
            audio = writer.add_stream("aac", rate=heard.rate, layout=heard.layout.name)
        for i, frame in enumerate(itertools.islice(reader.decode(seen), frames)):
            picture = frame.reformat(video.width, video.height, video.pix_fmt)
            picture.pts, picture.time_base = i, 1 / rate
            writer.mux(video.encode(picture))
        writer.mux(video.encode())
        if audio is not None:
            reader.seek(0)
            sounds = reader.decode(heard)
            for sound in itertools.takewhile(lambda sound: sound.time < frames / rate, sounds):
                writer.mux(audio.encode(sound))
            writer.mux(audio.encode())
    return target
