"""Frames to files and back: mp4, webm and gif through ffmpeg, png as a zip of lossless frames.

    writing    frames to a file        reading    a file to frames, what it holds, one picture of it
    ffmpeg     the binary, and what its failures mean

The only room that runs ffmpeg. Refuses to know where a file goes afterwards, which model made the frames, and what the
plan promised about them: callers compare.
"""

from vidgen.media.reading import Probe as Probe
from vidgen.media.reading import over_white as over_white
from vidgen.media.reading import poster as poster
from vidgen.media.reading import probe as probe
from vidgen.media.reading import read_frames as read_frames
from vidgen.media.reading import read_video as read_video
from vidgen.media.writing import Encoded as Encoded
from vidgen.media.writing import Encoder as Encoder
from vidgen.media.writing import adopt as adopt
from vidgen.media.writing import start as start
from vidgen.media.writing import write as write
