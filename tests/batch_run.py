"""A batch run without a model: what a killed run leaves behind is the same. A helper of the tests.

    python batch_run.py INPUT OUTPUT SECONDS_PER_LINE

answers every line with its own custom_id, and always resumes.
"""

import sys
import time

from onecast.runtime.batch_file import BatchWriter, check_unchanged, read_batch


def main(source: str, output: str, seconds_per_line: float) -> None:
    with BatchWriter(output, resume=True) as writer:
        check_unchanged(source, writer.done)
        print("running", flush=True)
        for line in read_batch(source, writer.done):
            if line.problem is not None:
                writer.write(line.problem_result())
                continue
            writer.write(line.result({"answer": [line.custom_id] * 50}))
            time.sleep(seconds_per_line)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
