// Mouse, pen, fingers and keys.

import type { App } from "./app";
import type { Point } from "./geometry";
import { fillHelp, keyName, type Binding } from "./help";
import { FILTERS, type Filter } from "./list";
import * as ui from "./ui";

export function bindings(app: App): Binding[] {
  const make = (group: string, keys: string[], shown: string, what: string, run: () => void): Binding =>
    ({ group, keys, shown, what, run });
  const arrows = (modifier: string, by: number, resize: boolean): Binding[] =>
    ([["ArrowLeft", -by, 0], ["ArrowRight", by, 0], ["ArrowUp", 0, -by], ["ArrowDown", 0, by]] as [string, number, number][])
      .map(([key, dx, dy]) => make("", [modifier + key], "", "", () => {
        if (!app.nudge(dx, dy, resize) && !modifier && dx) app.step(Math.sign(dx));
      }));
  const chosen = (): string | null => app.editor?.selection?.id ?? app.editor?.waiting ?? app.editor?.lesions[0]?.id ?? null;
  const withChosen = (run: (id: string) => void): (() => void) => () => {
    const id = chosen();
    if (id !== null) run(id);
  };
  return [
    make("Draw", ["b"], "B", "a big box in the middle, to be moved by keys", () => app.editor?.addInside(app.seen)),
    make("Draw", ["c"], "C", "draw the core again with the next drag", withChosen((id) => { app.editor?.drawCore(id); app.showState(); })),
    make("Draw", ["s"], "S", "suggest the core again from the big box", withChosen((id) => app.editor?.askForCore(id))),
    make("Change", ["Tab"], "Tab", "select the next box", () => { app.flush(); app.editor?.cycle(1); app.showState(); }),
    make("Change", ["Shift+Tab"], "Shift+Tab", "select the box before", () => { app.flush(); app.editor?.cycle(-1); app.showState(); }),
    make("Change", [], "\u2190\u2191\u2192\u2193", "move the selected box by a pixel; with Shift by ten", () => undefined),
    make("Change", [], "Ctrl+\u2190\u2191\u2192\u2193", "resize it by its lower right corner; with Shift by ten", () => undefined),
    ...arrows("", 1, false), ...arrows("Shift+", 10, false), ...arrows("Ctrl+", 1, true), ...arrows("Ctrl+Shift+", 10, true),
    make("Change", ["Delete", "Backspace"], "Del", "delete the selected lesion",
      () => { if (app.editor?.selection) app.editor.remove(app.editor.selection.id); }),
    make("Change", ["Ctrl+z"], "Ctrl+Z", "undo", () => { app.flush(); app.editor?.undo(); }),
    make("Change", ["Ctrl+Shift+z", "Ctrl+y"], "Ctrl+Shift+Z Ctrl+Y", "redo", () => { app.flush(); app.editor?.redo(); }),
    make("Change", ["Escape"], "Esc", "give up the drag, select nothing", () => { app.editor?.cancel(); app.showState(); }),
    make("Decide", ["Enter"], "Enter", "accept what is proposed, or go to the next image to do", () => app.finish()),
    make("Decide", ["a"], "A", "accept the proposal", () => app.accept()),
    make("Decide", ["r"], "R", "reject the proposal; the image is to be drawn", () => app.reject()),
    make("Decide", ["x"], "X", "no lesion in this image", () => app.mark("no_lesion")),
    make("Decide", ["t"], "T", "cannot tell", () => app.mark("cannot_tell")),
    make("Move about", ["PageDown", "n"], "N PageDown", "next image", () => app.step(1)),
    make("Move about", ["PageUp", "p"], "P PageUp", "previous image", () => app.step(-1)),
    make("Move about", ["Home"], "Home", "first image", () => app.step(-1e9)),
    make("Move about", ["End"], "End", "last image", () => app.step(1e9)),
    make("Move about", ["/"], "/", "find an image by name", () => ui.byId<HTMLInputElement>("search").focus()),
    make("Move about", ["f"], "F", "next list: all, to do, review, done", () => cycleFilter(app)),
    make("Move about", ["l"], "L", "show or hide the list", () => document.body.classList.toggle("list-away")),
    make("Look", ["+", "="], "+", "zoom in", () => app.zoom(1.3)),
    make("Look", ["-"], "\u2212", "zoom out", () => app.zoom(1 / 1.3)),
    make("Look", ["0"], "0", "the whole image", () => app.fit()),
    make("Look", ["1"], "1", "one pixel of the image on one of the screen", () => app.zoom(1 / app.view.scale)),
    ...([["Alt+ArrowLeft", 60, 0], ["Alt+ArrowRight", -60, 0], ["Alt+ArrowUp", 0, 60], ["Alt+ArrowDown", 0, -60]] as
      [string, number, number][]).map(([key, dx, dy]) => make("", [key], "", "", () => app.pan(dx, dy))),
    make("Look", [], "Alt+\u2190\u2191\u2192\u2193", "move the picture", () => undefined),
    make("Look", ["m"], "M", "masks: both, model, box prior, none", () => cycleMasks(app)),
    make("Look", ["h"], "H", "hide or show the boxes", () => flip(app, "boxes")),
    make("Look", ["k"], "K", "more contrast; with Shift less", () => look(app, "contrast", 0.15)),
    make("", ["Shift+k"], "", "", () => look(app, "contrast", -0.15)),
    make("Look", ["g"], "G", "lift the dark (gamma); with Shift lower it", () => look(app, "gamma", 0.15)),
    make("", ["Shift+g"], "", "", () => look(app, "gamma", -0.15)),
    make("Look", ["v"], "V", "contrast and gamma as they were", () => resetLook(app)),
    make("Look", ["?", "F1"], "?", "this help", () => openHelp()),
  ];
}

function cycleFilter(app: App): void {
  const place = FILTERS.findIndex(([name]) => name === app.list.filter);
  setFilter(app, FILTERS[(place + 1) % FILTERS.length][0]);
}

export function setFilter(app: App, filter: Filter): void {
  app.list.setFilter(filter);
  for (const button of ui.byId("filters").children) {
    button.setAttribute("aria-selected", String((button as HTMLElement).dataset.filter === filter));
  }
}

function cycleMasks(app: App): void {
  const states: [boolean, boolean][] = app.session.model
    ? [[true, true], [true, false], [false, true], [false, false]] : [[true, true], [false, false]];
  const now = states.findIndex(([model, prior]) => model === app.shown.model && prior === app.shown.prior);
  [app.shown.model, app.shown.prior] = states[(now + 1) % states.length];
  showSwitches(app);
}

function flip(app: App, name: "model" | "prior" | "fill" | "boxes"): void {
  app.shown[name] = !app.shown[name];
  showSwitches(app);
}

function look(app: App, name: "contrast" | "gamma", by: number): void {
  const input = ui.byId<HTMLInputElement>(name);
  app.setLook({ [name]: Math.min(Number(input.max), Math.max(Number(input.min), app.look[name] + by)) });
  showSwitches(app);
}

function resetLook(app: App): void {
  app.setLook({ contrast: 1, gamma: 1 });
  showSwitches(app);
}

function openHelp(): void {
  const dialog = ui.byId<HTMLDialogElement>("help");
  if (dialog.open) dialog.close();
  else dialog.showModal();
}

export function showSwitches(app: App): void {
  for (const name of ["model", "prior", "fill", "boxes"] as const) {
    ui.byId<HTMLInputElement>(`show-${name}`).checked = app.shown[name];
  }
  for (const name of ["contrast", "gamma"] as const) {
    const input = ui.byId<HTMLInputElement>(name);
    input.value = String(app.look[name]);
    (input.nextElementSibling as HTMLElement).textContent = app.look[name].toFixed(2);
  }
  app.repaint();
}

export function bindKeys(app: App): void {
  const all = bindings(app);
  const byKey = new Map(all.flatMap((each) => each.keys.map((key) => [key, each.run] as [string, () => void])));
  fillHelp(ui.byId("keys"), all.filter((each) => each.shown));
  window.addEventListener("keydown", (event) => {
    const target = event.target as HTMLElement;
    const dialog = ui.byId<HTMLDialogElement>("help");
    if (dialog.open) {
      if (event.key === "?" || event.key === "F1") dialog.close();
      return;
    }
    if (target instanceof HTMLInputElement && target.type !== "range" && target.type !== "checkbox") {
      if (event.key === "Escape" || event.key === "Enter") target.blur();
      return;
    }
    if (event.code === "Space" && !event.ctrlKey) {
      document.body.classList.add("panning");
      event.preventDefault();
      return;
    }
    const run = byKey.get(keyName(event));
    if (!run) return;
    event.preventDefault();
    app.isTouch = false;
    app.watch.tick();
    run();
  });
  window.addEventListener("keyup", (event) => {
    if (event.code === "Space") document.body.classList.remove("panning");
  });
  window.addEventListener("blur", () => document.body.classList.remove("panning"));
}

const PALM = 700; // ms after a pen was near in which a touch is the hand that holds it

export function bindPointers(app: App, canvas: HTMLCanvasElement): void {
  const fingers = new Map<number, Point>();
  let drawing: number | null = null; // the pointer whose drag it is; others do not move it
  let [penSeen, penDown] = [-Infinity, false];
  let panned: { id: number; last: Point } | null = null;
  const place = (event: { clientX: number; clientY: number }): Point => {
    const frame = canvas.getBoundingClientRect();
    return { x: event.clientX - frame.left, y: event.clientY - frame.top };
  };
  const reach = (event: PointerEvent): { handle: number; start: number } => app.reach(event.pointerType !== "mouse");
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "pen") {
      [penSeen, penDown] = [event.timeStamp, true];
      fingers.clear();
      if (app.editor?.drag) app.editor.cancel(); // the hand was down before the pen
    } else if (event.pointerType === "touch" && (penDown || event.timeStamp - penSeen < PALM)) return;
    else if (event.pointerType === "mouse" && app.editor?.drag) return;
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    app.isTouch = event.pointerType !== "mouse";
    app.watch.tick();
    app.flush();
    const p = place(event);
    if (event.pointerType === "touch") fingers.set(event.pointerId, p);
    if (fingers.size === 2) {
      app.editor?.cancel();
      panned = null;
      return;
    }
    if (event.button === 1 || event.button === 2 || document.body.classList.contains("panning")) {
      panned = { id: event.pointerId, last: p };
      return;
    }
    if (event.button !== 0 || fingers.size > 2 || !app.editor) return;
    if (event.shiftKey) app.editor.forceNew = true;
    drawing = event.pointerId;
    app.editor.begin(app.view.toImage(p), reach(event).handle);
    app.showState();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerType === "pen") penSeen = event.timeStamp;
    if (app.editor?.drag && event.pointerId !== drawing && !fingers.has(event.pointerId)) return;
    const p = place(event);
    app.pointer = p;
    const before = fingers.get(event.pointerId);
    if (before && fingers.size === 2) {
      const [other] = [...fingers.entries()].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      const [was, is] = [Math.hypot(before.x - other.x, before.y - other.y), Math.hypot(p.x - other.x, p.y - other.y)];
      fingers.set(event.pointerId, p);
      app.zoom(is / Math.max(was, 1), { x: (p.x + other.x) / 2, y: (p.y + other.y) / 2 });
      app.pan((p.x - before.x) / 2, (p.y - before.y) / 2);
      return;
    }
    if (panned?.id === event.pointerId) {
      app.pan(p.x - panned.last.x, p.y - panned.last.y);
      panned.last = p;
      return;
    }
    if (!app.editor) return;
    if (app.editor.drag) {
      const begun = app.editor.drag.started;
      app.editor.move(app.view.toImage(p), reach(event));
      if (!begun && app.editor.drag?.started) app.showState();
    } else {
      canvas.style.cursor = cursor(app, p);
      app.repaint();
    }
  });
  const up = (event: PointerEvent): void => {
    fingers.delete(event.pointerId);
    if (event.pointerType === "pen") penDown = false;
    if (panned?.id === event.pointerId) {
      panned = null;
      return;
    }
    if (!app.editor?.drag || event.pointerId !== drawing) return;
    app.watch.tick();
    if (event.type === "pointercancel") app.editor.cancel();
    else app.editor.end(reach(event));
    app.showState();
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => { app.pointer = null; app.repaint(); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 30 : 1;
    app.zoom(Math.exp((-event.deltaY * unit) / (event.ctrlKey ? 120 : 500)), place(event));
  }, { passive: false });
}

const CURSORS: Record<string, string> = {
  n: "ns-resize", s: "ns-resize", e: "ew-resize", w: "ew-resize", nw: "nwse-resize", se: "nwse-resize",
  ne: "nesw-resize", sw: "nesw-resize", move: "move",
};

function cursor(app: App, p: Point): string {
  if (document.body.classList.contains("panning")) return "grab";
  const target = app.editor?.targetAt(app.view.toImage(p), app.reach(false).handle);
  return target && "handle" in target ? CURSORS[target.handle] : "crosshair";
}
