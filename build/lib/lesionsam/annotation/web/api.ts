// Asking the server, and saving: every change is sent at once, kept in this browser until the server has it on disk,
// sent again after a lost connection, and never written over somebody else's.

import type { Changes, Detail, Mark, Preview, Session, Snapshot, State, Box } from "./types";

/** An answer that is no success: `retry` where it may succeed later without anybody changing anything. */
export class Problem extends Error {
  constructor(message: string, readonly status: number, readonly retry: boolean, readonly state: State | null = null) {
    super(message);
  }
}

async function ask<T>(address: string, method = "GET", body?: unknown): Promise<T> {
  let answer: Response;
  try {
    answer = await fetch(address, {
      method,
      cache: "no-store",
      credentials: "same-origin",
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Problem("no connection to the page's server (was it ended?); trying again", 0, true);
  }
  const kind = answer.headers.get("content-type") ?? "";
  const values = kind.startsWith("application/json") ? await answer.json().catch(() => ({})) : {};
  if (!answer.ok) {
    const said = values.problem || `the server answered ${answer.status}`;
    throw new Problem(said, answer.status, answer.status === 503, values.state ?? null);
  }
  return values as T;
}

export const session = (): Promise<Session> => ask("/api/session");
export const changes = (clock: number): Promise<Changes> => ask(`/api/changes?clock=${clock}`);
export const detail = (key: string): Promise<Detail> => ask(`/api/images/${key}`);
export const prepare = (keys: string[]): Promise<unknown> => ask("/api/prepare", "POST", { keys });
export const queue = (): Promise<{ images: [string, number][]; left: number }> => ask("/api/queue");

export function preview(key: string, id: string, big: Box, small: Box | null, others: Box[]): Promise<Preview> {
  return ask(`/api/images/${key}/preview`, "POST", { id, big, small, others });
}

export async function picture(key: string, level: string): Promise<ImageBitmap> {
  let answer: Response;
  try {
    answer = await fetch(`/api/images/${key}/picture?level=${level}`, { cache: "no-store" });
  } catch {
    throw new Problem("no connection to the page's server (was it ended?)", 0, true);
  }
  if (!answer.ok) {
    const values = await answer.json().catch(() => ({}));
    throw new Problem(values.problem || `the server answered ${answer.status}`, answer.status, false);
  }
  return createImageBitmap(await answer.blob());
}

interface Work {
  base: number;
  snapshot: Snapshot;
  change: string;
  earlier: string[]; // names of changes that were sent and may have arrived
  seconds: Record<string, number>;
  sending: boolean;
  wait: number;
  timer: number;
  problem: string;
  theirs: State | null;
}

export interface Listener {
  saved(key: string, state: State, isLast: boolean): void;
  failed(key: string, problem: string, theirs: State | null): void;
}

const RETRIES = [500, 1000, 2000, 4000];

/** One queue per image; the newest state of an image is all that needs to arrive. */
export class Saver {
  private work = new Map<string, Work>();
  who = "";

  constructor(private store: string, private listener: Listener) {}

  /** Images whose last change is not on the server's disk. */
  get unsaved(): string[] {
    return [...this.work.keys()];
  }

  problemOf(key: string): { problem: string; theirs: State | null } | null {
    const work = this.work.get(key);
    return work && work.problem ? { problem: work.problem, theirs: work.theirs } : null;
  }

  snapshotOf(key: string): Snapshot | null {
    return this.work.get(key)?.snapshot ?? null;
  }

  save(key: string, base: number, snapshot: Snapshot, seconds: Record<string, number>): void {
    const old = this.work.get(key);
    const work: Work = old ?? {
      base, snapshot, change: "", earlier: [], seconds: {}, sending: false, wait: 0, timer: 0, problem: "", theirs: null,
    };
    work.snapshot = structuredClone(snapshot);
    if (work.change && work.sending) work.earlier.push(work.change);
    work.change = crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random().toString(36).slice(2)}`;
    for (const [id, more] of Object.entries(seconds)) work.seconds[id] = (work.seconds[id] ?? 0) + more;
    this.work.set(key, work);
    this.keep(key, work);
    if (!work.theirs) void this.send(key, work);
  }

  /** After a conflict: write over what is there, or give one's own up. */
  resolve(key: string, mine: boolean): void {
    const work = this.work.get(key);
    if (!work || !work.theirs) return;
    if (!mine) {
      this.forget(key);
      return;
    }
    work.base = work.theirs.revision;
    work.theirs = null;
    work.problem = "";
    void this.send(key, work);
  }

  /** Changes that an earlier visit could not save. */
  restore(): number {
    let count = 0;
    for (let k = 0; k < localStorage.length; k++) {
      const name = localStorage.key(k) ?? "";
      if (!name.startsWith(this.prefix)) continue;
      try {
        const kept = JSON.parse(localStorage.getItem(name) ?? "");
        const key = name.slice(this.prefix.length);
        const work: Work = {
          base: kept.base, snapshot: kept.snapshot, change: kept.change, earlier: kept.earlier ?? [], seconds: {},
          sending: false, wait: 0, timer: 0, problem: "", theirs: null,
        };
        this.work.set(key, work);
        void this.send(key, work);
        count++;
      } catch {
        continue;
      }
    }
    return count;
  }

  private get prefix(): string {
    return `lesionsam:${this.store}:`;
  }

  private keep(key: string, work: Work): void {
    const kept = { base: work.base, snapshot: work.snapshot, change: work.change, earlier: work.earlier.slice(-8) };
    try {
      localStorage.setItem(this.prefix + key, JSON.stringify(kept));
    } catch {
      return; // a full or forbidden store: the change still goes to the server
    }
  }

  private forget(key: string): void {
    const work = this.work.get(key);
    if (work) window.clearTimeout(work.timer);
    this.work.delete(key);
    try {
      localStorage.removeItem(this.prefix + key);
    } catch {
      return;
    }
  }

  private async send(key: string, work: Work): Promise<void> {
    if (work.sending) return;
    window.clearTimeout(work.timer);
    work.sending = true;
    const { change, snapshot } = work;
    const seconds = work.seconds;
    work.seconds = {};
    const capped = (id: string): number => Math.min(3600, Math.round((seconds[id] ?? 0) * 100) / 100);
    const known = new Set(snapshot.lesions.map((lesion) => lesion.id));
    const rest = Object.keys(seconds).filter((id) => !known.has(id)).reduce((sum, id) => sum + capped(id), 0);
    const body = {
      base: work.base, change, who: this.who, mark: snapshot.mark as Mark, seconds: Math.min(3600, rest),
      shown: snapshot.inSight ?? false,
      lesions: snapshot.lesions.map((lesion) => ({
        id: lesion.id, big: lesion.big, small: lesion.small, core: lesion.core, proposed: lesion.proposed,
        agreed: lesion.agreed ?? false, seconds: capped(lesion.id),
      })),
    };
    try {
      const answer = await ask<{ state: State }>(`/api/images/${key}`, "PUT", body);
      work.sending = false;
      work.base = answer.state.revision;
      work.wait = 0;
      work.problem = "";
      const isLast = work.change === change;
      if (isLast) this.forget(key);
      else this.keep(key, work);
      this.listener.saved(key, answer.state, isLast);
      if (!isLast) void this.send(key, work);
    } catch (error) {
      work.sending = false;
      for (const [id, more] of Object.entries(seconds)) work.seconds[id] = (work.seconds[id] ?? 0) + more;
      if (!(error instanceof Problem)) throw error;
      this.failed(key, work, change, error);
    }
  }

  private failed(key: string, work: Work, change: string, error: Problem): void {
    if (error.status === 409 && error.state) {
      if (work.earlier.includes(error.state.change)) {
        work.base = error.state.revision; // the change before this one did arrive; its answer got lost
        void this.send(key, work);
        return;
      }
      work.theirs = error.state;
    }
    work.problem = error.message;
    this.listener.failed(key, error.message, work.theirs);
    if (error.retry) {
      work.timer = window.setTimeout(() => void this.send(key, work), RETRIES[Math.min(work.wait++, 3)]);
    } else if (!work.theirs && work.change !== change) {
      void this.send(key, work);
    }
  }
}
