// A person's seconds: the time between actions that follow each other; a pause counts for nothing beyond a few seconds.

const PAUSE = 20_000; // ms

export class Watch {
  private last = 0;
  private sum = 0;

  /** Somebody did something. */
  tick(now = performance.now()): void {
    if (this.last) this.sum += Math.min(now - this.last, PAUSE);
    this.last = now;
  }

  /** The image has changed: what was not credited to anything is dropped, looking at the next begins. */
  begin(now = performance.now()): void {
    this.sum = 0;
    this.last = now;
  }

  /** Seconds since they were last taken. */
  take(): number {
    this.tick();
    const seconds = this.sum / 1000;
    this.sum = 0;
    return seconds;
  }
}
