// The page: which image is open, what was drawn on it, what is saved, what comes next.

import * as api from "./api";
import { adjusted, Pictures, type Look } from "./pictures";
import { draw, type Shown } from "./draw";
import { Editor, type Reach } from "./editor";
import { same, View, type Point } from "./geometry";
import { List, isToDo } from "./list";
import { Previews } from "./previews";
import { Watch } from "./watch";
import * as ui from "./ui";
import type { Box, Detail, Mark, Preview, Row, Session, Snapshot, State } from "./types";

export const NARROW = "(max-width: 1100px)"; // as in the style sheet: the list is a drawer there
const POLL = 2000; // ms
const AHEAD = 3; // pictures fetched before they are asked for
const SETTLE = 350; // ms after the last nudge until it is saved
const SHARP = 1.2; // screen pixels per pixel of the picture above which the full picture is fetched

export class App {
  session!: Session;
  rows: Row[] = [];
  row: Row | null = null;
  editor: Editor | null = null;
  view = new View();
  look: Look = { contrast: 1, gamma: 1 };
  shown: Shown = { model: true, prior: true, fill: true, boxes: true };
  pointer: Point | null = null;
  isTouch = window.matchMedia("(pointer: coarse)").matches;
  saver!: api.Saver;
  readonly watch = new Watch();
  readonly list: List;
  private byKey = new Map<string, Row>();
  private pictures = new Pictures();
  private previews = new Previews((id, preview, isNewest) => this.previewArrived(id, preview, isNewest));
  private picture: { bitmap: ImageBitmap; seen: CanvasImageSource; level: string } | null = null;
  private details = new Map<string, Promise<Detail>>();
  private fitted = true;
  private frame = 0;
  private settle = 0;
  private nudged = false;
  private opening = 0;
  private asked = { at: 0, boxes: "" }; // when the boxes were last let go of
  private connected = true;
  private tableProblem = "";
  private imageProblem = "";

  constructor(private canvas: HTMLCanvasElement) {
    this.list = new List(ui.byId("scroller"), ui.byId("spacer"), ui.byId("empty"), (key) => {
      if (window.matchMedia(NARROW).matches) document.body.classList.add("list-away");
      void this.open(key);
    });
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement as HTMLElement);
  }

  async start(): Promise<void> {
    this.session = await api.session();
    this.rows = this.session.images.map(([key, id, status, count, revision]) => ({ key, id, status, count, revision }));
    this.byKey = new Map(this.rows.map((row) => [row.key, row]));
    document.title = `${this.session.title} \u00b7 LesionSAM`;
    ui.byId("title").textContent = this.session.title;
    document.body.classList.toggle("with-model", this.session.model !== null);
    this.saver = new api.Saver(this.session.store, {
      saved: (key, state, isLast) => this.saved(key, state, isLast),
      failed: (key, problem, theirs) => this.failed(key, problem, theirs),
    });
    this.list.setRows(this.rows);
    ui.showProgress(this.rows);
    this.tableProblem = this.session.problem;
    const restored = this.saver.restore();
    if (restored) ui.toast(`${restored} change${restored > 1 ? "s" : ""} of an earlier visit ${restored > 1 ? "are" : "is"} being saved`);
    this.showState();
    const first = this.byKey.get(location.hash.slice(1)) ?? this.resume() ?? this.rows[0];
    if (first) await this.open(first.key);
    window.setTimeout(() => void this.poll(), POLL);
  }

  /** Where one stopped: the image that was open last, or the first one after it that is to do. */
  private resume(): Row | undefined {
    const last = this.rows.findIndex((row) => row.key === localStorage.getItem(`lesionsam-last:${this.session.store}`));
    const open = [...this.rows.slice(Math.max(0, last)), ...this.rows.slice(0, Math.max(0, last))];
    return open.find((row) => row.status === "open") ?? this.rows[Math.max(0, last)];
  }

  // ------------------------------------------------------------------------------------------------------ opening

  async open(key: string): Promise<void> {
    const row = this.byKey.get(key);
    if (!row) return;
    const started = performance.now();
    this.flush();
    const turn = ++this.opening;
    this.row = row;
    history.replaceState(null, "", `#${key}`);
    try {
      localStorage.setItem(`lesionsam-last:${this.session.store}`, key);
    } catch { /* only the place to begin next time is lost */ }
    this.list.setCurrent(key);
    ui.byId("name").textContent = row.id;
    let detail: Detail;
    let bitmap: ImageBitmap;
    const waiting = window.setTimeout(() => { if (turn === this.opening) ui.hint("Opening\u2026", "0"); }, 150);
    try {
      [detail, bitmap] = await Promise.all([this.detail(row), this.pictures.get(key)]);
    } catch (error) {
      if (turn === this.opening) this.cannotOpen(row, error);
      return;
    } finally {
      window.clearTimeout(waiting);
    }
    if (turn !== this.opening) return;
    this.details.delete(key);
    this.imageProblem = detail.problem;
    const kept = this.saver.snapshotOf(key);
    this.previews.clear();
    this.ghosts = [];
    this.proposalSeen = kept?.inSight ?? false;
    this.editor = new Editor(detail.width, detail.height, kept ?? detail.state, detail.proposal,
      (live, id) => this.changed(live, id));
    row.revision = detail.state.revision;
    this.picture = { bitmap, seen: adjusted(bitmap, this.look), level: "view" };
    this.fit();
    ui.byId("facts").textContent = `${detail.width} \u00d7 ${detail.height} px` + (detail.state.by
      ? ` \u00b7 ${detail.state.by}, ${detail.state.at.slice(0, 10)}` : "");
    for (const lesion of this.editor.lesions) this.askPreview(lesion.id);
    this.askGhosts();
    this.showState();
    this.watch.begin();
    this.canvas.dataset.image = row.id;
    window.requestAnimationFrame(() => { this.canvas.dataset.openMs = (performance.now() - started).toFixed(1); });
    this.lookAhead();
  }

  private cannotOpen(row: Row, error: unknown): void {
    if (!(error instanceof api.Problem)) throw error;
    this.details.delete(row.key);
    this.imageProblem = "";
    this.editor = null;
    this.picture = null;
    this.previews.clear();
    ui.byId("facts").textContent = "";
    ui.byId("lesions").replaceChildren();
    this.showState();
    ui.banner(error.message, [{ text: "Try again", run: () => void this.open(row.key) },
      { text: "Next image", run: () => this.step(1) }]);
    this.repaint();
  }

  private detail(row: Row): Promise<Detail> {
    let found = this.details.get(row.key);
    if (!found) {
      found = api.detail(row.key);
      found.catch(() => this.details.delete(row.key));
      this.details.set(row.key, found);
    }
    return found;
  }

  private lookAhead(): void {
    const place = this.list.rows.findIndex((row) => row.key === this.row?.key);
    const next = this.list.rows.slice(place + 1, place + 1 + AHEAD);
    const open = this.nextOpen();
    const wanted = [...(open && !next.includes(open) ? [open] : []), ...next, ...this.list.rows.slice(Math.max(0, place - 1), place)];
    for (const row of wanted) {
      if (row.status === "faulty") continue;
      this.pictures.get(row.key).catch(() => undefined);
      this.detail(row).catch(() => undefined);
    }
    if (this.session.model) {
      const keys = [...(this.row ? [this.row.key] : []), ...wanted.map((row) => row.key)];
      api.prepare(keys.slice(0, 8)).catch(() => undefined);
    }
  }

  step(by: number): void {
    const rows = this.list.rows;
    if (!rows.length) return;
    const place = rows.findIndex((row) => row.key === this.row?.key);
    const next = rows[Math.min(rows.length - 1, Math.max(0, place < 0 ? 0 : place + by))];
    if (next && next !== this.row) void this.open(next.key);
  }

  private nextOpen(): Row | undefined {
    const rows = this.list.rows.length ? this.list.rows : this.rows;
    const place = rows.findIndex((row) => row.key === this.row?.key);
    const isWanted = (row: Row): boolean => isToDo(row) || (this.list.filter === "review" && row.status === "unseen");
    return [...rows.slice(place + 1), ...rows.slice(0, Math.max(0, place))].find(isWanted);
  }

  /** Done with this image; the next one that needs somebody. */
  finish(): void {
    this.flush();
    if (this.editor?.ghosts.length) {
      this.accept();
      return;
    }
    const next = this.nextOpen();
    if (next) void this.open(next.key);
    else ui.toast("Nothing is left to do in this list.");
  }

  // ------------------------------------------------------------------------------------------------------ changing

  /** The editor's boxes changed: live while a drag or a nudge goes on, else for good. */
  private changed(live: boolean, id: string | null): void {
    if (!this.editor) return;
    if (live) {
      const sketch = this.editor.sketch;
      if (sketch) this.previews.ask("sketch", this.key, sketch, null, this.others(null));
      else if (id) this.askPreview(id);
      this.repaint();
      return;
    }
    this.previews.forget("sketch");
    const lesion = this.editor.lesion(id);
    if (id && lesion?.core === "suggested") {
      this.nudged = true; // saved when the suggestion is there, or a moment later without it
      this.previews.ask(id, this.key, lesion.big, null, this.others(id));
      window.clearTimeout(this.settle);
      this.settle = window.setTimeout(() => this.flush(), SETTLE);
    } else {
      for (const each of this.editor.lesions) if (!id || each.id === id) this.askPreview(each.id);
      this.save(id);
    }
    this.asked = { at: performance.now(), boxes: lesion ? JSON.stringify([lesion.big, lesion.small]) : "" };
    this.showState();
  }

  private get key(): string {
    return this.row?.key ?? "";
  }

  private others(id: string | null): Box[] {
    return (this.editor?.lesions ?? []).filter((each) => each.id !== id).map((each) => each.big);
  }

  private askPreview(id: string): void {
    const lesion = this.editor?.lesion(id);
    if (lesion) this.previews.ask(id, this.key, lesion.big, lesion.small, this.others(id));
  }

  ghosts: Preview[] = [];
  private proposalSeen = false; // of the image that is open

  private askGhosts(): void {
    this.editor?.ghosts.forEach((ghost, index) => {
      this.previews.ask(`ghost${index}`, this.key, ghost.big, ghost.small, []);
    });
  }

  private previewArrived(id: string, preview: Preview, isNewest: boolean): void {
    const lesion = this.editor?.lesion(id);
    if (id.startsWith("ghost")) this.ghosts[Number(id.slice(5))] = preview;
    if (lesion && lesion.core === "suggested" && isNewest && (this.nudged || !same(lesion.small, preview.small))) {
      this.editor?.suggested(id, preview.small);
      this.nudged = true;
      this.flush();
    }
    if (this.asked.at && isNewest && lesion) {
      const since = this.asked.at;
      this.asked.at = 0;
      window.requestAnimationFrame(() => {
        this.canvas.dataset.previewMs = `${this.canvas.dataset.previewMs ?? ""} ${(performance.now() - since).toFixed(1)}`;
      });
    }
    if (isNewest && !this.editor?.drag) this.showPanel();
    this.repaint();
  }

  /** Arrow keys: saved when they come to rest. */
  nudge(dx: number, dy: number, resize: boolean): boolean {
    const done = this.editor?.nudge(dx, dy, resize, this.nudged) ?? false;
    if (done) {
      this.nudged = true;
      ui.showSaved("saving", "saving\u2026");
      window.clearTimeout(this.settle);
      this.settle = window.setTimeout(() => this.flush(), SETTLE);
    }
    return done;
  }

  /** Save what is still waiting for a pause. */
  flush(): void {
    window.clearTimeout(this.settle);
    if (!this.nudged) return;
    this.nudged = false;
    this.save(this.editor?.selection?.id ?? null);
    this.showState();
  }

  private save(id: string | null): void {
    if (!this.editor || !this.row) return;
    const credited = id && this.editor.lesion(id) ? id : this.editor.lesions[0]?.id ?? "";
    const snapshot = { ...this.editor.snapshot(), inSight: this.proposalSeen };
    this.saver.save(this.row.key, this.row.revision, snapshot, { [credited]: this.watch.take() });
    this.note(this.row, snapshot);
  }

  /** What the list shows of an image, before the server has answered. */
  private note(row: Row, snapshot: Snapshot): void {
    row.count = snapshot.lesions.length;
    const isUnseen = snapshot.lesions.some((each) => each.source === "automatic" && !each.agreed);
    row.status = isUnseen ? "unseen" : row.count ? "done" : snapshot.mark || "open";
    this.list.update(row);
    ui.showProgress(this.rows);
  }

  mark(mark: Mark): void {
    if (!this.editor) return;
    this.flush();
    this.editor.setMark(this.editor.mark === mark ? "" : mark);
    if (mark !== "rejected" && this.editor.mark) window.setTimeout(() => this.finish(), 120);
  }

  reject(): void {
    if (this.editor?.ghosts.length || this.editor?.lesions.some((each) => each.source !== "drawn")) this.mark("rejected");
  }

  accept(): void {
    if (!this.editor) return;
    this.flush();
    if (this.editor.accept()) window.setTimeout(() => this.finish(), 120);
    else if (this.editor.lesions.length) this.finish();
  }

  // ------------------------------------------------------------------------------------------------------ saved

  private saved(key: string, state: State, isLast: boolean): void {
    const row = this.byKey.get(key);
    this.details.delete(key);
    if (!row) return;
    row.revision = state.revision;
    if (isLast) {
      row.status = state.status;
      row.count = state.lesions.length;
      if (row === this.row) {
        this.editor?.adopt(state);
        this.imageProblem = ""; // what is saved lies inside the image
      }
    }
    this.connected = true;
    this.list.update(row);
    if (row === this.row && !this.editor?.drag) this.showPanel();
    this.showState();
  }

  private failed(key: string, problem: string, theirs: State | null): void {
    if (!theirs) this.connected = !problem.startsWith("no connection");
    if (theirs && this.row?.key !== key) ui.toast(`${this.byKey.get(key)?.id ?? "An image"}: ${problem}`);
    this.showState();
  }

  private async poll(): Promise<void> {
    try {
      const news = await api.changes(this.session.clock);
      if (!this.connected) ui.toast("Connected again.");
      this.connected = true;
      this.session.clock = news.clock;
      this.tableProblem = news.problem;
      for (const [key, status, count, revision] of news.changed) await this.changedElsewhere(key, status, count, revision);
      if (news.changed.length) ui.showProgress(this.rows);
      if (news.proposed !== this.numProposed) await this.readQueue(news.proposed);
    } catch (error) {
      if (!(error instanceof api.Problem)) throw error;
      this.connected = error.status !== 0;
      if (error.status !== 0) this.tableProblem = error.message;
    }
    this.showState();
    window.setTimeout(() => void this.poll(), document.hidden ? 4 * POLL : POLL);
  }

  private numProposed = 0;

  private async readQueue(count: number): Promise<void> {
    const queue = await api.queue();
    this.numProposed = count;
    this.details.clear(); // what was read ahead lacks the new proposals
    this.list.doubts = new Map(queue.images);
    if (this.list.filter === "review") this.list.refresh();
  }

  private async changedElsewhere(key: string, status: Row["status"], count: number, revision: number): Promise<void> {
    const row = this.byKey.get(key);
    if (!row || revision <= row.revision || this.saver.snapshotOf(key)) return;
    Object.assign(row, { status, count });
    this.details.delete(key);
    this.list.update(row);
    if (row !== this.row || !this.editor || this.editor.drag || this.nudged) return;
    const detail = await this.detail(row).catch((error: unknown) => {
      if (!(error instanceof api.Problem)) throw error;
      return null; // said when it is opened again; the other images' news must not be lost for it
    });
    const editor = this.editor as Editor | null; // another image may have been opened meanwhile
    if (!detail || !editor || row !== this.row || editor.drag || this.saver.snapshotOf(key)) return;
    row.revision = detail.state.revision;
    editor.replace(detail.state);
    for (const lesion of editor.lesions) this.askPreview(lesion.id);
    ui.toast(`${detail.state.by} changed this image; shown as it is now.`);
  }

  /** Banner, save state, hint and panel say what is so. */
  showState(): void {
    const unsaved = this.saver.unsaved;
    const trouble = this.row ? this.saver.problemOf(this.row.key) : null;
    const kept = "What you drew is kept in this browser.";
    if (trouble?.theirs) {
      ui.banner(`${trouble.problem}. Your boxes are still here.`, [
        { text: "Keep mine", run: () => this.resolve(true) }, { text: "Take theirs", run: () => this.resolve(false) },
      ]);
    } else if (!this.connected) ui.banner(`No connection to the page's server; was it ended? ${kept} It is saved as soon as the server is back.`);
    else if (trouble) ui.banner(`Not saved: ${trouble.problem}. ${trouble.problem.includes("kept here") ? "" : kept}`);
    else if (this.tableProblem) ui.banner(this.tableProblem);
    else if (this.editor) ui.banner(this.imageProblem);
    if (unsaved.some((key) => this.saver.problemOf(key))) ui.showSaved("unsaved", `${unsaved.length} not saved`);
    else if (unsaved.length || this.nudged) ui.showSaved("saving", "saving\u2026");
    else ui.showSaved("saved", "all saved");
    ui.hint(...ui.hintFor(this.editor, this.isTouch));
    this.showPanel();
    this.repaint();
  }

  private resolve(mine: boolean): void {
    const row = this.row;
    if (!row) return;
    const theirs = this.saver.problemOf(row.key)?.theirs;
    this.saver.resolve(row.key, mine);
    if (!mine && theirs) {
      this.editor?.replace(theirs);
      row.revision = theirs.revision;
      this.note(row, theirs);
      this.editor?.lesions.forEach((lesion) => this.askPreview(lesion.id));
    }
    this.showState();
  }

  showPanel(): void {
    const editor = this.editor;
    for (const [name, able] of [["undo", editor?.canUndo], ["redo", editor?.canRedo], ["accept", editor?.ghosts.length
      || editor?.lesions.some((each) => each.source === "automatic")], ["reject", editor?.ghosts.length || editor?.lesions.some((each) => each.source !== "drawn")],
      ["no-lesion", editor], ["cannot-tell", editor]] as [string, unknown][]) {
      for (const button of document.querySelectorAll<HTMLButtonElement>(`[data-run="${name}"]`)) button.disabled = !able;
    }
    for (const name of ["no-lesion", "cannot-tell"]) {
      const button = document.querySelector(`[data-run="${name}"]`);
      button?.classList.toggle("on", editor?.mark === name.replace("-", "_"));
    }
    if (!editor) return;
    if (editor.ghosts.length || editor.lesions.some((each) => each.source === "automatic")) this.proposalSeen = true;
    ui.showProposal(editor.proposal, editor.ghosts.length > 0);
    ui.showLesions(editor, this.previews.results, (id) => {
      editor.selection = { id, part: "big" };
      this.showState();
    }, (id) => editor.remove(id));
  }

  // ------------------------------------------------------------------------------------------------------ seeing

  resize(): void {
    const { clientWidth, clientHeight } = this.canvas.parentElement as HTMLElement;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    this.canvas.style.width = `${clientWidth}px`;
    this.canvas.style.height = `${clientHeight}px`;
    if (this.fitted) this.fit();
    this.repaint();
  }

  fit(): void {
    if (!this.editor) return;
    this.view.fit(this.editor.width, this.editor.height, this.canvas.clientWidth, this.canvas.clientHeight);
    this.fitted = true;
    this.repaint();
  }

  zoom(factor: number, at?: Point): void {
    if (!this.editor) return;
    const fit = new View();
    fit.fit(this.editor.width, this.editor.height, this.canvas.clientWidth, this.canvas.clientHeight);
    this.view.zoom(factor, at ?? { x: this.canvas.clientWidth / 2, y: this.canvas.clientHeight / 2 }, fit.scale * 0.5);
    this.pan(0, 0);
    void this.sharpen();
  }

  pan(dx: number, dy: number): void {
    if (!this.editor) return;
    this.view.x += dx;
    this.view.y += dy;
    this.view.keep(this.editor.width, this.editor.height, this.canvas.clientWidth, this.canvas.clientHeight);
    this.fitted = false;
    this.repaint();
  }

  /** The whole picture, once it is looked at closely enough. */
  private async sharpen(): Promise<void> {
    const [row, now, editor] = [this.row, this.picture, this.editor];
    if (!row || !now || !editor || now.level === "full" || now.bitmap.width >= editor.width) return;
    if ((this.view.scale * window.devicePixelRatio * editor.width) / now.bitmap.width < SHARP) return;
    const bitmap = await this.pictures.get(row.key, "full").catch(() => null);
    if (!bitmap || this.row !== row) return;
    this.picture = { bitmap, seen: adjusted(bitmap, this.look), level: "full" };
    this.repaint();
  }

  setLook(look: Partial<Look>): void {
    Object.assign(this.look, look);
    if (this.picture) this.picture.seen = adjusted(this.picture.bitmap, this.look);
    this.repaint();
  }

  /** Pixels of the image that a finger or a pointer reaches, and that a drag must exceed. */
  reach(isCoarse: boolean): Reach {
    return { handle: (isCoarse ? 18 : 8) / this.view.scale, start: (isCoarse ? 8 : 4) / this.view.scale };
  }

  /** The part of the image that is in sight. */
  get seen(): Box {
    const a = this.view.toImage({ x: 0, y: 0 });
    const b = this.view.toImage({ x: this.canvas.clientWidth, y: this.canvas.clientHeight });
    return [Math.max(0, a.x), Math.max(0, a.y), Math.min(this.editor?.width ?? 1, b.x), Math.min(this.editor?.height ?? 1, b.y)];
  }

  repaint(): void {
    if (this.frame) return;
    this.frame = window.requestAnimationFrame(() => {
      this.frame = 0;
      const context = this.canvas.getContext("2d");
      if (!context) return;
      draw({
        context, width: this.canvas.clientWidth, height: this.canvas.clientHeight, ratio: window.devicePixelRatio || 1,
        view: this.view, picture: this.picture?.seen ?? null, editor: this.editor, previews: this.previews.results,
        ghosts: this.ghosts, shown: this.shown, pointer: this.isTouch ? null : this.pointer, handle: this.isTouch ? 16 : 9,
      });
      this.canvas.dataset.view = [this.view.scale, this.view.x, this.view.y].join(",");
      ui.byId("scale").textContent = `${Math.round(this.view.scale * 100)} %`;
    });
  }
}
