r"""Make movie_sentences.csv.gz from the archive inside vaderSentiment's source distribution.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    tar xzf vaderSentiment-3.3.2.tar.gz
    python make_movie_sentences.py \
        vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz movie_sentences.csv.gz

The bytes are the same wherever zlib compresses alike; the *content* always is:
its sha256 is in README.md, and a test checks it.
"""

import csv
import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

MEMBER = "movieReviewSnippets_GroundTruth.txt"
MEMBER_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


def read_ground_truth(archive: Path) -> str:
    """The ratings file as text, after a check that it is the one this script was written for."""
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if Path(m.name).name == MEMBER)
        extracted = tar.extractfile(member)
        if extracted is None:
            raise ValueError(f"{MEMBER} in {archive} is not an ordinary file.")
        raw = extracted.read()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != MEMBER_SHA256:
        raise ValueError(f"{MEMBER} has sha256 {digest}, expected {MEMBER_SHA256}.")
    return raw.decode("utf-8")  # strict; read as latin-1 the accents of 133 rows would be garbled


def to_csv(ground_truth: str) -> str:
    """Rows `label,text` in the file's own order; the rating itself is dropped."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["label", "text"])
    for line in ground_truth.split("\r\n"):
        _, rating, text = line.split("\t")
        writer.writerow([int(float(rating) > 0), text])
    return out.getvalue()


def main() -> None:
    """Read the archive named first, write the compressed file named second."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    archive, target = map(Path, sys.argv[1:])
    content = to_csv(read_ground_truth(archive)).encode("utf-8")
    # No time and no name in the header: making the file twice gives the same bytes.
    target.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    print(f"{target}: sha256 of the content {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
