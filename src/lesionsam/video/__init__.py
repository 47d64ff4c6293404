"""Track lesions through a clip from boxes in one frame or a few."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.video.clips import open_clip
    from lesionsam.video.run import track

__all__ = ["open_clip", "track"]
__getattr__, __dir__ = lazy_names(__name__, clips="open_clip", run="track")
