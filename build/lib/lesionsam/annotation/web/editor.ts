// The boxes of the image that is open: drawing, dragging, nudging, undo. It knows no screen and no server.

import * as g from "./geometry";
import type { Box, Lesion, Mark, Part, Proposal, Snapshot, State } from "./types";

export interface Selection {
  id: string;
  part: Part;
}

export type Target =
  | { kind: "new" }
  | { kind: "core"; id: string }
  | { kind: "edit"; id: string; part: Part; handle: g.Handle; whole: boolean }
  | { kind: "ghost"; index: number; part: Part; handle: g.Handle };

interface Drag {
  target: Target;
  from: g.Point;
  to: g.Point;
  before: Snapshot;
  hadCore: string | null;
  started: boolean;
}

export interface Reach {
  handle: number; // pixels of the image around an edge that still count as the edge
  start: number; // pixels of the image below which a drag is a click
}

const HISTORY = 200;

export class Editor {
  lesions: Lesion[] = [];
  mark: Mark = "";
  selection: Selection | null = null;
  waiting: string | null = null; // the lesion whose core the next drag draws
  proposal: Proposal | null = null;
  forceNew = false; // the next drag draws a new box wherever it begins
  drag: Drag | null = null;
  private undoStack: Snapshot[] = [];
  private redoStack: Snapshot[] = [];

  constructor(
    readonly width: number,
    readonly height: number,
    state: State | Snapshot,
    proposal: Proposal | null,
    private changed: (live: boolean, id: string | null) => void,
  ) {
    this.lesions = structuredClone(state.lesions);
    this.mark = state.mark;
    this.proposal = proposal;
  }

  get frame(): Box {
    return [0, 0, this.width, this.height];
  }

  snapshot(): Snapshot {
    return structuredClone({ lesions: this.lesions, mark: this.mark });
  }

  lesion(id: string | null): Lesion | undefined {
    return this.lesions.find((each) => each.id === id);
  }

  get canUndo(): boolean {
    return this.undoStack.length > 0;
  }

  get canRedo(): boolean {
    return this.redoStack.length > 0;
  }

  /** Boxes of the proposal, as they are shown. */
  get ghosts(): { big: Box; small: Box }[] {
    return this.proposal && !this.lesions.length && !this.mark ? this.proposal.lesions : [];
  }

  // ---------------------------------------------------------------------------------------------------- changing

  private remember(before: Snapshot): void {
    this.undoStack.push(before);
    if (this.undoStack.length > HISTORY) this.undoStack.shift();
    this.redoStack = [];
  }

  private restore(snapshot: Snapshot): void {
    this.lesions = structuredClone(snapshot.lesions);
    this.mark = snapshot.mark;
    this.waiting = null;
    if (!this.lesion(this.selection?.id ?? null)) this.selection = null;
    this.changed(false, null);
  }

  undo(): boolean {
    const before = this.undoStack.pop();
    if (!before) return false;
    this.redoStack.push(this.snapshot());
    this.restore(before);
    return true;
  }

  redo(): boolean {
    const after = this.redoStack.pop();
    if (!after) return false;
    this.undoStack.push(this.snapshot());
    this.restore(after);
    return true;
  }

  /** What the server has is newer: take it without a step to undo. */
  replace(state: State): void {
    this.lesions = structuredClone(state.lesions);
    this.mark = state.mark;
    this.undoStack = [];
    this.redoStack = [];
    this.drag = null;
    this.waiting = null;
    this.selection = null;
  }

  /** What the server knows of the lesions beside their boxes. */
  adopt(state: State): void {
    for (const theirs of state.lesions) {
      const mine = this.lesion(theirs.id);
      if (mine) {
        mine.source = theirs.source;
        mine.seconds = theirs.seconds;
        mine.proposed = theirs.proposed;
        mine.agreed = false;
      }
    }
  }

  private newId(): string {
    const used = this.lesions.map((each) => Number.parseInt(each.id, 10)).filter((value) => value >= 0);
    return String(used.length ? Math.max(...used) + 1 : this.lesions.length);
  }

  private add(big: Box, small: Box, proposed: [Box, Box] | null, core: "drawn" | "suggested"): Lesion {
    const lesion: Lesion = {
      id: this.newId(), big: g.rounded(big), small: g.rounded(small), core, proposed, seconds: 0,
      source: proposed ? "accepted" : "drawn",
    };
    this.lesions.push(lesion);
    this.mark = "";
    this.selection = { id: lesion.id, part: core === "drawn" ? "big" : "small" };
    return lesion;
  }

  /** A new box by key: the middle of what is seen. */
  addInside(seen: Box): void {
    this.remember(this.snapshot());
    const big = g.atLeast(g.keptInside(g.middle(seen, 0.5), this.frame), this.frame);
    const lesion = this.add(big, g.middle(big), null, "suggested");
    this.selection = { id: lesion.id, part: "big" };
    this.waiting = lesion.id;
    this.changed(false, lesion.id);
  }

  /** A core that the server suggests, unless somebody has touched it meanwhile. */
  suggested(id: string, small: Box): void {
    const lesion = this.lesion(id);
    if (lesion && lesion.core === "suggested") lesion.small = g.rounded(g.keptInside(small, lesion.big));
  }

  askForCore(id: string): void {
    const lesion = this.lesion(id);
    if (!lesion) return;
    this.remember(this.snapshot());
    lesion.core = "suggested";
    this.selection = { id, part: "small" };
    this.changed(false, id);
  }

  /** The next drag inside the big box draws its core. */
  drawCore(id: string): void {
    this.waiting = id;
    this.selection = { id, part: "small" };
  }

  remove(id: string): void {
    this.remember(this.snapshot());
    this.lesions = this.lesions.filter((each) => each.id !== id);
    this.selection = null;
    this.waiting = null;
    this.changed(false, null);
  }

  setMark(mark: Mark): void {
    this.remember(this.snapshot());
    this.mark = mark;
    this.lesions = [];
    this.selection = null;
    this.waiting = null;
    this.changed(false, null);
  }

  /** Take the proposal as it is, or agree with what no person has looked at. */
  accept(): boolean {
    const automatic = this.lesions.filter((each) => each.source === "automatic");
    if (this.lesions.length && !automatic.length) return false;
    if (!this.lesions.length && !this.ghosts.length) return false;
    this.remember(this.snapshot());
    for (const lesion of automatic) lesion.agreed = true;
    if (!this.lesions.length) {
      for (const { big, small } of this.ghosts) this.add(big, small, [big, small], "drawn");
    }
    this.selection = null;
    this.changed(false, null);
    return true;
  }

  /** Selection by key: big box, core, next lesion. */
  cycle(step: number): void {
    const all = this.lesions.flatMap((each) => [{ id: each.id, part: "big" }, { id: each.id, part: "small" }] as Selection[]);
    if (!all.length) return;
    this.waiting = null;
    const now = all.findIndex((each) => each.id === this.selection?.id && each.part === this.selection.part);
    this.selection = all[(now + step + all.length + (now < 0 && step < 0 ? 1 : 0)) % all.length];
  }

  /** Arrows: move the selected box, or its lower right corner. Steps that follow each other are one step to undo. */
  nudge(dx: number, dy: number, resize: boolean, isNext: boolean): boolean {
    const lesion = this.lesion(this.selection?.id ?? null);
    if (!lesion || !this.selection) return false;
    if (!isNext) this.remember(this.snapshot());
    const handle: g.Handle = resize ? "se" : "move";
    this.apply(lesion, structuredClone(lesion), this.selection.part, handle, dx, dy, !resize);
    this.changed(true, lesion.id);
    return true;
  }

  private apply(lesion: Lesion, was: Lesion, part: Part, handle: g.Handle, dx: number, dy: number,
                whole: boolean): void {
    if (part === "big") {
      lesion.big = g.rounded(g.resized(was.big, handle, dx, dy, this.frame));
      const shift: [number, number] = whole && handle === "move" ? [lesion.big[0] - was.big[0], lesion.big[1] - was.big[1]] : [0, 0];
      const carried: Box = [was.small[0] + shift[0], was.small[1] + shift[1], was.small[2] + shift[0], was.small[3] + shift[1]];
      lesion.small = g.rounded(g.keptInside(carried, lesion.big));
    } else {
      lesion.small = g.rounded(g.atLeast(g.resized(was.small, handle, dx, dy, lesion.big), lesion.big));
      lesion.core = "drawn";
      if (this.waiting === lesion.id) this.waiting = null;
    }
  }

  // ---------------------------------------------------------------------------------------------------- dragging

  /** What a drag that begins here would do. */
  targetAt(p: g.Point, reach: number): Target {
    if (this.forceNew) return { kind: "new" };
    const chosen = this.lesion(this.selection?.id ?? null);
    const order = [...this.lesions].reverse().sort((a, b) => Number(b === chosen) - Number(a === chosen));
    for (const lesion of order) {
      const parts: Part[] = this.selection?.id === lesion.id && this.selection.part === "big" ? ["big", "small"] : ["small", "big"];
      for (const part of parts) {
        if (part === "small" && lesion.id === this.waiting) continue; // a drag there draws, wherever it begins
        const handle = g.handleAt(lesion[part], p, reach);
        if (handle && handle !== "move") return { kind: "edit", id: lesion.id, part, handle, whole: false };
      }
    }
    const awaiting = this.lesion(this.waiting);
    if (awaiting && g.holds(awaiting.big, p)) {
      const [x, y] = [(awaiting.small[0] + awaiting.small[2]) / 2, (awaiting.small[1] + awaiting.small[3]) / 2];
      if (Math.hypot(p.x - x, p.y - y) <= reach * 1.2) {
        return { kind: "edit", id: awaiting.id, part: "small", handle: "move", whole: false };
      }
      return { kind: "core", id: awaiting.id };
    }
    for (const part of ["small", "big"] as Part[]) {
      for (const lesion of order) {
        if (g.holds(lesion[part], p)) return { kind: "edit", id: lesion.id, part, handle: "move", whole: part === "big" };
      }
    }
    for (const part of ["small", "big"] as Part[]) {
      for (const [index, ghost] of this.ghosts.entries()) {
        const handle = g.handleAt(ghost[part], p, reach);
        if (handle && (handle !== "move" || part === "small")) return { kind: "ghost", index, part, handle };
      }
    }
    return { kind: "new" };
  }

  begin(p: g.Point, reach: number): void {
    this.drag = {
      target: this.targetAt(p, reach), from: p, to: p, before: this.snapshot(), hadCore: this.waiting, started: false,
    };
  }

  move(p: g.Point, reach: Reach): void {
    const drag = this.drag;
    if (!drag) return;
    drag.to = p;
    if (!drag.started) {
      if (Math.hypot(p.x - drag.from.x, p.y - drag.from.y) < reach.start) return;
      drag.started = true;
      if (drag.target.kind === "new" && this.waiting) this.waiting = null;
      if (drag.target.kind === "ghost") this.takeGhosts(drag, drag.target);
    }
    const target = drag.target;
    const [dx, dy] = [p.x - drag.from.x, p.y - drag.from.y];
    if (target.kind === "edit") {
      const lesion = this.lesion(target.id);
      const was = drag.before.lesions.find((each) => each.id === target.id);
      if (!lesion || !was) return;
      this.selection = { id: target.id, part: target.part };
      this.apply(lesion, was, target.part, target.handle, dx, dy, target.whole);
      this.changed(true, target.id);
    } else if (target.kind === "core") {
      const lesion = this.lesion(target.id);
      if (!lesion) return;
      lesion.small = g.rounded(g.atLeast(g.boxBetween(drag.from, p, lesion.big), lesion.big));
      lesion.core = "drawn";
      this.changed(true, target.id);
    } else {
      this.changed(true, null);
    }
  }

  /** Dragging a proposed box makes the proposal a lesion that is being corrected. */
  private takeGhosts(drag: Drag, target: { index: number; part: Part; handle: g.Handle }): void {
    const added = this.ghosts.map(({ big, small }) => ({ big, small }))
      .map(({ big, small }) => this.add(big, small, [big, small], "drawn"));
    const lesion = added[target.index];
    drag.before = { lesions: structuredClone(this.lesions), mark: "" };
    drag.target = { kind: "edit", id: lesion.id, part: target.part, handle: target.handle, whole: false };
    this.undoStack.push({ lesions: [], mark: "" });
  }

  /** The box that is being drawn, as long as it is. */
  get sketch(): Box | null {
    const drag = this.drag;
    return drag && drag.started && drag.target.kind === "new" ? g.boxBetween(drag.from, drag.to, this.frame) : null;
  }

  /** Ends a drag; gives the lesion that it changed or made, or null where it was a click. */
  end(reach: Reach): string | null {
    const drag = this.drag;
    const box = this.sketch;
    this.drag = null;
    if (!drag) return null;
    this.forceNew = false;
    if (!drag.started) {
      this.click(drag, reach);
      return null;
    }
    if (drag.target.kind === "new") {
      if (!box || box[2] - box[0] < g.LEAST || box[3] - box[1] < g.LEAST) return null;
      this.remember(drag.before);
      const lesion = this.add(box, g.middle(box), null, "suggested");
      this.waiting = lesion.id;
      this.changed(false, lesion.id);
      return lesion.id;
    }
    const id = drag.target.kind === "ghost" ? null : drag.target.id;
    if (drag.target.kind === "core") {
      this.waiting = null;
      this.selection = { id: drag.target.id, part: "small" };
    }
    this.remember(drag.before);
    this.changed(false, id);
    return id;
  }

  private click(drag: Drag, reach: Reach): void {
    const target = drag.target;
    if (target.kind === "edit") this.selection = { id: target.id, part: target.part };
    else if (target.kind === "core") {
      this.selection = { id: target.id, part: "small" }; // the suggested core is kept, its handles are there now
      this.waiting = null;
    }
    else if (!this.lesions.some((each) => g.holds(each.big, drag.from, reach.handle))) {
      this.selection = null;
      this.waiting = null;
    }
  }

  /** Escape: the drag never happened; else nothing is selected any more. */
  cancel(): boolean {
    if (this.drag) {
      const before = this.drag.before;
      const was = this.drag.hadCore;
      this.drag = null;
      this.lesions = before.lesions;
      this.mark = before.mark;
      this.waiting = was;
      this.changed(true, null);
      return true;
    }
    const had = this.selection !== null || this.waiting !== null || this.forceNew;
    this.selection = null;
    this.waiting = null;
    this.forceNew = false;
    return had;
  }
}
