// Made by "make web" from the TypeScript files beside it, of SHA-256 8ecba52f5eda85cf5438ed8237b48cf6bd6b1cc018689e0147d266292b70854e; change those, not this.
"use strict";
(() => {
  // src/lesionsam/annotation/web/api.ts
  var Problem = class extends Error {
    constructor(message, status, retry, state = null) {
      super(message);
      this.status = status;
      this.retry = retry;
      this.state = state;
    }
  };
  async function ask(address, method = "GET", body) {
    let answer;
    try {
      answer = await fetch(address, {
        method,
        cache: "no-store",
        credentials: "same-origin",
        headers: body === void 0 ? {} : { "content-type": "application/json" },
        body: body === void 0 ? void 0 : JSON.stringify(body)
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
    return values;
  }
  var session = () => ask("/api/session");
  var changes = (clock) => ask(`/api/changes?clock=${clock}`);
  var detail = (key) => ask(`/api/images/${key}`);
  var prepare = (keys) => ask("/api/prepare", "POST", { keys });
  var queue = () => ask("/api/queue");
  function preview(key, id, big, small, others) {
    return ask(`/api/images/${key}/preview`, "POST", { id, big, small, others });
  }
  async function picture(key, level) {
    let answer;
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
  var RETRIES = [500, 1e3, 2e3, 4e3];
  var Saver = class {
    constructor(store, listener) {
      this.store = store;
      this.listener = listener;
      this.work = /* @__PURE__ */ new Map();
      this.who = "";
    }
    /** Images whose last change is not on the server's disk. */
    get unsaved() {
      return [...this.work.keys()];
    }
    problemOf(key) {
      const work = this.work.get(key);
      return work && work.problem ? { problem: work.problem, theirs: work.theirs } : null;
    }
    snapshotOf(key) {
      return this.work.get(key)?.snapshot ?? null;
    }
    save(key, base, snapshot, seconds) {
      const old = this.work.get(key);
      const work = old ?? {
        base,
        snapshot,
        change: "",
        earlier: [],
        seconds: {},
        sending: false,
        wait: 0,
        timer: 0,
        problem: "",
        theirs: null
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
    resolve(key, mine) {
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
    restore() {
      let count = 0;
      for (let k = 0; k < localStorage.length; k++) {
        const name = localStorage.key(k) ?? "";
        if (!name.startsWith(this.prefix)) continue;
        try {
          const kept = JSON.parse(localStorage.getItem(name) ?? "");
          const key = name.slice(this.prefix.length);
          const work = {
            base: kept.base,
            snapshot: kept.snapshot,
            change: kept.change,
            earlier: kept.earlier ?? [],
            seconds: {},
            sending: false,
            wait: 0,
            timer: 0,
            problem: "",
            theirs: null
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
    get prefix() {
      return `lesionsam:${this.store}:`;
    }
    keep(key, work) {
      const kept = { base: work.base, snapshot: work.snapshot, change: work.change, earlier: work.earlier.slice(-8) };
      try {
        localStorage.setItem(this.prefix + key, JSON.stringify(kept));
      } catch {
        return;
      }
    }
    forget(key) {
      const work = this.work.get(key);
      if (work) window.clearTimeout(work.timer);
      this.work.delete(key);
      try {
        localStorage.removeItem(this.prefix + key);
      } catch {
        return;
      }
    }
    async send(key, work) {
      if (work.sending) return;
      window.clearTimeout(work.timer);
      work.sending = true;
      const { change, snapshot } = work;
      const seconds = work.seconds;
      work.seconds = {};
      const capped = (id) => Math.min(3600, Math.round((seconds[id] ?? 0) * 100) / 100);
      const known = new Set(snapshot.lesions.map((lesion) => lesion.id));
      const rest = Object.keys(seconds).filter((id) => !known.has(id)).reduce((sum, id) => sum + capped(id), 0);
      const body = {
        base: work.base,
        change,
        who: this.who,
        mark: snapshot.mark,
        seconds: Math.min(3600, rest),
        shown: snapshot.inSight ?? false,
        lesions: snapshot.lesions.map((lesion) => ({
          id: lesion.id,
          big: lesion.big,
          small: lesion.small,
          core: lesion.core,
          proposed: lesion.proposed,
          agreed: lesion.agreed ?? false,
          seconds: capped(lesion.id)
        }))
      };
      try {
        const answer = await ask(`/api/images/${key}`, "PUT", body);
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
    failed(key, work, change, error) {
      if (error.status === 409 && error.state) {
        if (work.earlier.includes(error.state.change)) {
          work.base = error.state.revision;
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
  };

  // src/lesionsam/annotation/web/pictures.ts
  var KEPT = 9;
  var Pictures = class {
    constructor() {
      this.held = /* @__PURE__ */ new Map();
    }
    /** The picture of an image; fetched once. */
    get(key, level = "view") {
      const name = `${level}/${key}`;
      let found = this.held.get(name);
      if (found) this.held.delete(name);
      else {
        found = picture(key, level);
        found.catch(() => this.held.delete(name));
      }
      this.held.set(name, found);
      while (this.held.size > KEPT) {
        const [oldest, promise] = this.held.entries().next().value;
        this.held.delete(oldest);
        promise.then((bitmap) => window.setTimeout(() => bitmap.close(), 5e3)).catch(() => void 0);
      }
      return found;
    }
    forget(key) {
      for (const level of ["view", "full"]) this.held.delete(`${level}/${key}`);
    }
  };
  function curve(look2) {
    const table = new Uint8ClampedArray(256);
    for (let k = 0; k < 256; k++) {
      const value = Math.min(1, Math.max(0, (k / 255 - 0.5) * look2.contrast + 0.5));
      table[k] = Math.round(255 * Math.pow(value, 1 / look2.gamma));
    }
    return table;
  }
  function adjusted(bitmap, look2) {
    if (look2.contrast === 1 && look2.gamma === 1) return bitmap;
    const canvas = document.createElement("canvas");
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    const table = curve(look2);
    for (let k = 0; k < pixels.data.length; k += 4) {
      pixels.data[k] = table[pixels.data[k]];
      pixels.data[k + 1] = table[pixels.data[k + 1]];
      pixels.data[k + 2] = table[pixels.data[k + 2]];
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  // src/lesionsam/annotation/web/draw.ts
  var MODEL = "#f0e442";
  var PRIOR = "#56b4e9";
  var RIM = "rgba(10, 10, 10, 0.75)";
  var WHITE = "#ffffff";
  function draw(scene) {
    const { context, width, height, ratio, view, editor } = scene;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!editor) return;
    const corner = view.toScreen({ x: 0, y: 0 });
    if (scene.picture) {
      context.imageSmoothingEnabled = view.scale < 6;
      context.imageSmoothingQuality = "high";
      context.drawImage(scene.picture, corner.x, corner.y, editor.width * view.scale, editor.height * view.scale);
    } else {
      context.fillStyle = "#20262b";
      context.fillRect(corner.x, corner.y, editor.width * view.scale, editor.height * view.scale);
    }
    if (editor.sketch || editor.drag?.target.kind === "core") dim(scene, editor);
    drawGhosts(scene, editor);
    for (const lesion of editor.lesions) drawMask(scene, scene.previews.get(lesion.id));
    if (editor.sketch) drawMask(scene, scene.previews.get("sketch"));
    if (scene.shown.boxes || editor.drag) {
      for (const lesion of editor.lesions) drawLesion(scene, editor, lesion);
    }
    if (editor.sketch) {
      outline(scene, editor.sketch, WHITE, [7, 5], 2);
      const core = scene.previews.get("sketch")?.small;
      if (core) outline(scene, core, WHITE, [2, 4], 1.5);
    }
    if (scene.pointer && !editor.drag) cross(scene, editor);
  }
  function dim(scene, editor) {
    const { context, view } = scene;
    const target = editor.drag?.target;
    const box = editor.sketch ?? (target?.kind === "core" ? editor.lesion(target.id)?.big : null);
    if (!box) return;
    const a = view.toScreen({ x: 0, y: 0 });
    const b = view.toScreen({ x: editor.width, y: editor.height });
    const [x0, y0, x1, y1] = onScreen(scene, box);
    context.fillStyle = "rgba(8, 10, 12, 0.35)";
    context.beginPath();
    context.rect(a.x, a.y, b.x - a.x, b.y - a.y);
    context.rect(x0, y0, x1 - x0, y1 - y0);
    context.fill("evenodd");
  }
  function onScreen(scene, box) {
    const a = scene.view.toScreen({ x: box[0], y: box[1] });
    const b = scene.view.toScreen({ x: box[2], y: box[3] });
    return [a.x, a.y, b.x, b.y];
  }
  function outline(scene, box, colour, dash, width) {
    const { context } = scene;
    const [x0, y0, x1, y1] = onScreen(scene, box);
    context.setLineDash([]);
    context.strokeStyle = RIM;
    context.lineWidth = width + 2;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    context.setLineDash(dash);
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    context.setLineDash([]);
  }
  function path(scene, rings) {
    const { context, view } = scene;
    context.beginPath();
    for (const ring of rings) {
      for (let k = 0; k < ring.length; k += 2) {
        const p = view.toScreen({ x: ring[k], y: ring[k + 1] });
        if (k) context.lineTo(p.x, p.y);
        else context.moveTo(p.x, p.y);
      }
      context.closePath();
    }
  }
  function drawMask(scene, preview2) {
    if (!preview2) return;
    const { context, shown } = scene;
    const layers = [];
    const both = shown.model && shown.prior && preview2.model;
    if (shown.prior || !preview2.model) layers.push([preview2.prior.rings, PRIOR, !both]);
    if (shown.model && preview2.model) layers.push([preview2.model.rings, MODEL, true]);
    if (!shown.model && !shown.prior) return;
    for (const [rings, colour, isMain] of layers) {
      path(scene, rings);
      if (shown.fill && isMain) {
        context.globalAlpha = 0.16;
        context.fillStyle = colour;
        context.fill("evenodd");
        context.globalAlpha = 1;
      }
      context.lineJoin = "round";
      context.strokeStyle = RIM;
      context.lineWidth = isMain ? 4 : 3;
      context.stroke();
      context.strokeStyle = colour;
      context.lineWidth = isMain ? 2 : 1.4;
      context.setLineDash(isMain ? [] : [4, 4]);
      context.stroke();
      context.setLineDash([]);
    }
  }
  function drawLesion(scene, editor, lesion) {
    const chosen = editor.selection?.id === lesion.id ? editor.selection.part : null;
    const isQuiet = editor.selection !== null && chosen === null;
    scene.context.globalAlpha = isQuiet ? 0.7 : 1;
    outline(scene, lesion.big, chosen === "big" ? "#ffd166" : WHITE, [8, 5], chosen === "big" ? 2.4 : 1.8);
    const dash = lesion.core === "suggested" ? [2, 4] : [];
    outline(scene, lesion.small, chosen === "small" ? "#ffd166" : WHITE, dash, chosen === "small" ? 2.4 : 1.8);
    scene.context.globalAlpha = 1;
    if (chosen && !editor.drag && !(chosen === "small" && editor.waiting === lesion.id)) handles(scene, lesion[chosen]);
    if (editor.waiting === lesion.id && !editor.drag) grip(scene, lesion.small);
    if (editor.lesions.length > 1) tag(scene, lesion);
  }
  function handles(scene, box) {
    const { context } = scene;
    const [x0, y0, x1, y1] = onScreen(scene, box);
    const [xm, ym] = [(x0 + x1) / 2, (y0 + y1) / 2];
    const side = scene.handle;
    const points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    if (x1 - x0 > side * 4) points.push([xm, y0], [xm, y1]);
    if (y1 - y0 > side * 4) points.push([x0, ym], [x1, ym]);
    for (const [x, y] of points) {
      context.fillStyle = "#ffd166";
      context.strokeStyle = "rgba(10, 10, 10, 0.9)";
      context.lineWidth = 1.5;
      context.beginPath();
      context.rect(x - side / 2, y - side / 2, side, side);
      context.fill();
      context.stroke();
    }
  }
  function grip(scene, box) {
    const { context } = scene;
    const [x0, y0, x1, y1] = onScreen(scene, box);
    const [x, y, r] = [(x0 + x1) / 2, (y0 + y1) / 2, scene.handle * 0.9];
    context.fillStyle = "rgba(15, 17, 19, 0.72)";
    context.beginPath();
    context.arc(x, y, r + 3, 0, 2 * Math.PI);
    context.fill();
    context.strokeStyle = "#ffd166";
    context.lineWidth = 1.6;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x, y);
      context.lineTo(x + dx * r, y + dy * r);
      context.moveTo(x + dx * r - (dx ? dx * 3 : -3), y + dy * r - (dy ? dy * 3 : -3));
      context.lineTo(x + dx * r, y + dy * r);
      context.lineTo(x + dx * r - (dx ? dx * 3 : 3), y + dy * r - (dy ? dy * 3 : 3));
    }
    context.stroke();
  }
  function tag(scene, lesion) {
    const { context } = scene;
    const [x0, y0] = onScreen(scene, lesion.big);
    context.font = "600 12px system-ui, sans-serif";
    const text = lesion.id;
    const width = context.measureText(text).width + 10;
    context.fillStyle = "rgba(15, 17, 19, 0.8)";
    context.fillRect(x0, y0 - 19, width, 17);
    context.fillStyle = WHITE;
    context.fillText(text, x0 + 5, y0 - 6);
  }
  function drawGhosts(scene, editor) {
    editor.ghosts.forEach((ghost, index) => {
      drawMask(scene, scene.ghosts[index]);
      if (!scene.shown.boxes) return;
      outline(scene, ghost.big, MODEL, [3, 4], 1.8);
      outline(scene, ghost.small, MODEL, [2, 3], 1.5);
    });
  }
  function cross(scene, editor) {
    const { context, view, pointer } = scene;
    if (!pointer) return;
    const a = view.toScreen({ x: 0, y: 0 });
    const b = view.toScreen({ x: editor.width, y: editor.height });
    if (pointer.x < a.x || pointer.x > b.x || pointer.y < a.y || pointer.y > b.y) return;
    context.strokeStyle = "rgba(255, 255, 255, 0.28)";
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(a.x, Math.round(pointer.y) + 0.5);
    context.lineTo(b.x, Math.round(pointer.y) + 0.5);
    context.moveTo(Math.round(pointer.x) + 0.5, a.y);
    context.lineTo(Math.round(pointer.x) + 0.5, b.y);
    context.stroke();
  }

  // src/lesionsam/annotation/web/geometry.ts
  var LEAST = 2;
  function clamp(value, low, high) {
    return Math.min(Math.max(value, low), Math.max(low, high));
  }
  function boxBetween(a, b, limits) {
    const [x0, y0, x1, y1] = limits;
    const xs = [clamp(a.x, x0, x1), clamp(b.x, x0, x1)];
    const ys = [clamp(a.y, y0, y1), clamp(b.y, y0, y1)];
    return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
  }
  function atLeast(box, limits) {
    const out = [...box];
    for (const k of [0, 1]) {
      const least = Math.min(LEAST, limits[k + 2] - limits[k]);
      if (out[k + 2] - out[k] < least) {
        const low = clamp((out[k] + out[k + 2] - least) / 2, limits[k], limits[k + 2] - least);
        out[k] = low;
        out[k + 2] = low + least;
      }
    }
    return out;
  }
  function moved(box, dx, dy, limits) {
    const ax = clamp(dx, limits[0] - box[0], limits[2] - box[2]);
    const ay = clamp(dy, limits[1] - box[1], limits[3] - box[3]);
    return [box[0] + ax, box[1] + ay, box[2] + ax, box[3] + ay];
  }
  function resized(box, handle, dx, dy, limits) {
    if (handle === "move") return moved(box, dx, dy, limits);
    const out = [...box];
    if (handle.includes("w")) out[0] = clamp(box[0] + dx, limits[0], box[2] - LEAST);
    if (handle.includes("e")) out[2] = clamp(box[2] + dx, box[0] + LEAST, limits[2]);
    if (handle.includes("n")) out[1] = clamp(box[1] + dy, limits[1], box[3] - LEAST);
    if (handle.includes("s")) out[3] = clamp(box[3] + dy, box[1] + LEAST, limits[3]);
    return out;
  }
  function keptInside(core, big) {
    const out = [...core];
    for (const k of [0, 1]) {
      const side = Math.min(core[k + 2] - core[k], big[k + 2] - big[k]);
      out[k] = clamp(core[k], big[k], big[k + 2] - side);
      out[k + 2] = out[k] + side;
    }
    return out;
  }
  function middle(big, share = 0.4) {
    const [x, y] = [(big[0] + big[2]) / 2, (big[1] + big[3]) / 2];
    const [u, v] = [(big[2] - big[0]) * share / 2, (big[3] - big[1]) * share / 2];
    return [x - u, y - v, x + u, y + v];
  }
  function rounded(box) {
    return box.map((value) => Math.round(value * 100) / 100);
  }
  function same(a, b) {
    return a.every((value, k) => Math.abs(value - b[k]) < 5e-3);
  }
  function holds(box, p, margin = 0) {
    return p.x >= box[0] - margin && p.x <= box[2] + margin && p.y >= box[1] - margin && p.y <= box[3] + margin;
  }
  function handleAt(box, p, reach) {
    if (!holds(box, p, reach)) return null;
    const inner = Math.min(reach, (box[2] - box[0]) / 4, (box[3] - box[1]) / 4);
    const n = p.y < box[1] + inner;
    const s = p.y > box[3] - inner;
    const w = p.x < box[0] + inner;
    const e = p.x > box[2] - inner;
    const name = (n ? "n" : s ? "s" : "") + (w ? "w" : e ? "e" : "");
    return name || "move";
  }
  var View = class {
    constructor() {
      this.scale = 1;
      this.x = 0;
      this.y = 0;
    }
    toScreen(p) {
      return { x: p.x * this.scale + this.x, y: p.y * this.scale + this.y };
    }
    toImage(p) {
      return { x: (p.x - this.x) / this.scale, y: (p.y - this.y) / this.scale };
    }
    /** The whole image in a canvas, with a margin. */
    fit(width, height, canvasWidth, canvasHeight) {
      const margin = Math.min(28, canvasWidth / 16, canvasHeight / 16);
      this.scale = Math.min((canvasWidth - 2 * margin) / width, (canvasHeight - 2 * margin) / height);
      this.x = (canvasWidth - width * this.scale) / 2;
      this.y = (canvasHeight - height * this.scale) / 2;
    }
    /** Zoom about a point of the screen. */
    zoom(factor, at, least) {
      const scale = clamp(this.scale * factor, least, 40);
      const p = this.toImage(at);
      this.scale = scale;
      this.x = at.x - p.x * scale;
      this.y = at.y - p.y * scale;
    }
    /** Keep some of the image in sight. */
    keep(width, height, canvasWidth, canvasHeight) {
      const seen = 60;
      this.x = clamp(this.x, seen - width * this.scale, canvasWidth - seen);
      this.y = clamp(this.y, seen - height * this.scale, canvasHeight - seen);
    }
  };

  // src/lesionsam/annotation/web/editor.ts
  var HISTORY = 200;
  var Editor = class {
    constructor(width, height, state, proposal, changed) {
      this.width = width;
      this.height = height;
      this.changed = changed;
      this.lesions = [];
      this.mark = "";
      this.selection = null;
      this.waiting = null;
      // the lesion whose core the next drag draws
      this.proposal = null;
      this.forceNew = false;
      // the next drag draws a new box wherever it begins
      this.drag = null;
      this.undoStack = [];
      this.redoStack = [];
      this.lesions = structuredClone(state.lesions);
      this.mark = state.mark;
      this.proposal = proposal;
    }
    get frame() {
      return [0, 0, this.width, this.height];
    }
    snapshot() {
      return structuredClone({ lesions: this.lesions, mark: this.mark });
    }
    lesion(id) {
      return this.lesions.find((each) => each.id === id);
    }
    get canUndo() {
      return this.undoStack.length > 0;
    }
    get canRedo() {
      return this.redoStack.length > 0;
    }
    /** Boxes of the proposal, as they are shown. */
    get ghosts() {
      return this.proposal && !this.lesions.length && !this.mark ? this.proposal.lesions : [];
    }
    // ---------------------------------------------------------------------------------------------------- changing
    remember(before) {
      this.undoStack.push(before);
      if (this.undoStack.length > HISTORY) this.undoStack.shift();
      this.redoStack = [];
    }
    restore(snapshot) {
      this.lesions = structuredClone(snapshot.lesions);
      this.mark = snapshot.mark;
      this.waiting = null;
      if (!this.lesion(this.selection?.id ?? null)) this.selection = null;
      this.changed(false, null);
    }
    undo() {
      const before = this.undoStack.pop();
      if (!before) return false;
      this.redoStack.push(this.snapshot());
      this.restore(before);
      return true;
    }
    redo() {
      const after = this.redoStack.pop();
      if (!after) return false;
      this.undoStack.push(this.snapshot());
      this.restore(after);
      return true;
    }
    /** What the server has is newer: take it without a step to undo. */
    replace(state) {
      this.lesions = structuredClone(state.lesions);
      this.mark = state.mark;
      this.undoStack = [];
      this.redoStack = [];
      this.drag = null;
      this.waiting = null;
      this.selection = null;
    }
    /** What the server knows of the lesions beside their boxes. */
    adopt(state) {
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
    newId() {
      const used = this.lesions.map((each) => Number.parseInt(each.id, 10)).filter((value) => value >= 0);
      return String(used.length ? Math.max(...used) + 1 : this.lesions.length);
    }
    add(big, small, proposed, core) {
      const lesion = {
        id: this.newId(),
        big: rounded(big),
        small: rounded(small),
        core,
        proposed,
        seconds: 0,
        source: proposed ? "accepted" : "drawn"
      };
      this.lesions.push(lesion);
      this.mark = "";
      this.selection = { id: lesion.id, part: core === "drawn" ? "big" : "small" };
      return lesion;
    }
    /** A new box by key: the middle of what is seen. */
    addInside(seen) {
      this.remember(this.snapshot());
      const big = atLeast(keptInside(middle(seen, 0.5), this.frame), this.frame);
      const lesion = this.add(big, middle(big), null, "suggested");
      this.selection = { id: lesion.id, part: "big" };
      this.waiting = lesion.id;
      this.changed(false, lesion.id);
    }
    /** A core that the server suggests, unless somebody has touched it meanwhile. */
    suggested(id, small) {
      const lesion = this.lesion(id);
      if (lesion && lesion.core === "suggested") lesion.small = rounded(keptInside(small, lesion.big));
    }
    askForCore(id) {
      const lesion = this.lesion(id);
      if (!lesion) return;
      this.remember(this.snapshot());
      lesion.core = "suggested";
      this.selection = { id, part: "small" };
      this.changed(false, id);
    }
    /** The next drag inside the big box draws its core. */
    drawCore(id) {
      this.waiting = id;
      this.selection = { id, part: "small" };
    }
    remove(id) {
      this.remember(this.snapshot());
      this.lesions = this.lesions.filter((each) => each.id !== id);
      this.selection = null;
      this.waiting = null;
      this.changed(false, null);
    }
    setMark(mark) {
      this.remember(this.snapshot());
      this.mark = mark;
      this.lesions = [];
      this.selection = null;
      this.waiting = null;
      this.changed(false, null);
    }
    /** Take the proposal as it is, or agree with what no person has looked at. */
    accept() {
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
    cycle(step) {
      const all = this.lesions.flatMap((each) => [{ id: each.id, part: "big" }, { id: each.id, part: "small" }]);
      if (!all.length) return;
      this.waiting = null;
      const now = all.findIndex((each) => each.id === this.selection?.id && each.part === this.selection.part);
      this.selection = all[(now + step + all.length + (now < 0 && step < 0 ? 1 : 0)) % all.length];
    }
    /** Arrows: move the selected box, or its lower right corner. Steps that follow each other are one step to undo. */
    nudge(dx, dy, resize, isNext) {
      const lesion = this.lesion(this.selection?.id ?? null);
      if (!lesion || !this.selection) return false;
      if (!isNext) this.remember(this.snapshot());
      const handle = resize ? "se" : "move";
      this.apply(lesion, structuredClone(lesion), this.selection.part, handle, dx, dy, !resize);
      this.changed(true, lesion.id);
      return true;
    }
    apply(lesion, was, part, handle, dx, dy, whole) {
      if (part === "big") {
        lesion.big = rounded(resized(was.big, handle, dx, dy, this.frame));
        const shift = whole && handle === "move" ? [lesion.big[0] - was.big[0], lesion.big[1] - was.big[1]] : [0, 0];
        const carried = [was.small[0] + shift[0], was.small[1] + shift[1], was.small[2] + shift[0], was.small[3] + shift[1]];
        lesion.small = rounded(keptInside(carried, lesion.big));
      } else {
        lesion.small = rounded(atLeast(resized(was.small, handle, dx, dy, lesion.big), lesion.big));
        lesion.core = "drawn";
        if (this.waiting === lesion.id) this.waiting = null;
      }
    }
    // ---------------------------------------------------------------------------------------------------- dragging
    /** What a drag that begins here would do. */
    targetAt(p, reach) {
      if (this.forceNew) return { kind: "new" };
      const chosen = this.lesion(this.selection?.id ?? null);
      const order = [...this.lesions].reverse().sort((a, b) => Number(b === chosen) - Number(a === chosen));
      for (const lesion of order) {
        const parts = this.selection?.id === lesion.id && this.selection.part === "big" ? ["big", "small"] : ["small", "big"];
        for (const part of parts) {
          if (part === "small" && lesion.id === this.waiting) continue;
          const handle = handleAt(lesion[part], p, reach);
          if (handle && handle !== "move") return { kind: "edit", id: lesion.id, part, handle, whole: false };
        }
      }
      const awaiting = this.lesion(this.waiting);
      if (awaiting && holds(awaiting.big, p)) {
        const [x, y] = [(awaiting.small[0] + awaiting.small[2]) / 2, (awaiting.small[1] + awaiting.small[3]) / 2];
        if (Math.hypot(p.x - x, p.y - y) <= reach * 1.2) {
          return { kind: "edit", id: awaiting.id, part: "small", handle: "move", whole: false };
        }
        return { kind: "core", id: awaiting.id };
      }
      for (const part of ["small", "big"]) {
        for (const lesion of order) {
          if (holds(lesion[part], p)) return { kind: "edit", id: lesion.id, part, handle: "move", whole: part === "big" };
        }
      }
      for (const part of ["small", "big"]) {
        for (const [index, ghost] of this.ghosts.entries()) {
          const handle = handleAt(ghost[part], p, reach);
          if (handle && (handle !== "move" || part === "small")) return { kind: "ghost", index, part, handle };
        }
      }
      return { kind: "new" };
    }
    begin(p, reach) {
      this.drag = {
        target: this.targetAt(p, reach),
        from: p,
        to: p,
        before: this.snapshot(),
        hadCore: this.waiting,
        started: false
      };
    }
    move(p, reach) {
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
        lesion.small = rounded(atLeast(boxBetween(drag.from, p, lesion.big), lesion.big));
        lesion.core = "drawn";
        this.changed(true, target.id);
      } else {
        this.changed(true, null);
      }
    }
    /** Dragging a proposed box makes the proposal a lesion that is being corrected. */
    takeGhosts(drag, target) {
      const added = this.ghosts.map(({ big, small }) => ({ big, small })).map(({ big, small }) => this.add(big, small, [big, small], "drawn"));
      const lesion = added[target.index];
      drag.before = { lesions: structuredClone(this.lesions), mark: "" };
      drag.target = { kind: "edit", id: lesion.id, part: target.part, handle: target.handle, whole: false };
      this.undoStack.push({ lesions: [], mark: "" });
    }
    /** The box that is being drawn, as long as it is. */
    get sketch() {
      const drag = this.drag;
      return drag && drag.started && drag.target.kind === "new" ? boxBetween(drag.from, drag.to, this.frame) : null;
    }
    /** Ends a drag; gives the lesion that it changed or made, or null where it was a click. */
    end(reach) {
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
        if (!box || box[2] - box[0] < LEAST || box[3] - box[1] < LEAST) return null;
        this.remember(drag.before);
        const lesion = this.add(box, middle(box), null, "suggested");
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
    click(drag, reach) {
      const target = drag.target;
      if (target.kind === "edit") this.selection = { id: target.id, part: target.part };
      else if (target.kind === "core") {
        this.selection = { id: target.id, part: "small" };
        this.waiting = null;
      } else if (!this.lesions.some((each) => holds(each.big, drag.from, reach.handle))) {
        this.selection = null;
        this.waiting = null;
      }
    }
    /** Escape: the drag never happened; else nothing is selected any more. */
    cancel() {
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
  };

  // src/lesionsam/annotation/web/list.ts
  var FILTERS = [["all", "All"], ["todo", "To do"], ["review", "Review"], ["done", "Done"]];
  var HEIGHT = 60;
  var SPARE = 4;
  var WORDS = {
    open: "to do",
    done: "",
    unseen: "accepted unseen",
    no_lesion: "no lesion",
    cannot_tell: "cannot tell",
    rejected: "proposal rejected, to draw",
    faulty: "cannot be opened"
  };
  var SIGNS = {
    open: "",
    done: "✓",
    unseen: "◌",
    no_lesion: "∅",
    cannot_tell: "?",
    rejected: "✕",
    faulty: "!"
  };
  var List = class {
    constructor(scroller, spacer, empty, picked) {
      this.scroller = scroller;
      this.spacer = spacer;
      this.empty = empty;
      this.picked = picked;
      this.rows = [];
      this.filter = "all";
      this.doubts = /* @__PURE__ */ new Map();
      this.all = [];
      this.search = "";
      this.pool = /* @__PURE__ */ new Map();
      this.drawn = 0;
      this.current = "";
      scroller.addEventListener("scroll", () => this.later(), { passive: true });
      new ResizeObserver(() => this.later()).observe(scroller);
    }
    setRows(all) {
      this.all = all;
      this.refresh();
    }
    setFilter(filter) {
      this.filter = filter;
      this.refresh();
      this.scroller.scrollTop = 0;
    }
    setSearch(search) {
      this.search = search.toLowerCase();
      this.refresh();
      this.scroller.scrollTop = 0;
    }
    setCurrent(key) {
      this.current = key;
      const place = this.rows.findIndex((row) => row.key === key);
      if (place >= 0) {
        const [top, view] = [place * HEIGHT, this.scroller.clientHeight];
        if (top < this.scroller.scrollTop || top + HEIGHT > this.scroller.scrollTop + view) {
          this.scroller.scrollTop = top - view / 2 + HEIGHT / 2;
        }
      }
      this.redraw();
    }
    /** Which rows there are, and in which order. */
    refresh() {
      const wanted = (row) => this.filter === "all" ? true : this.filter === "todo" ? isToDo(row) : this.filter === "done" ? !isToDo(row) && row.status !== "faulty" : row.status === "unseen" || this.doubts.has(row.key) && row.status === "open";
      this.rows = this.all.filter((row) => wanted(row) && (!this.search || row.id.toLowerCase().includes(this.search)));
      if (this.filter === "review") {
        const places = new Map([...this.doubts.keys()].map((key, place2) => [key, place2]));
        const place = (row) => (row.status === "unseen" ? void 0 : places.get(row.key)) ?? places.size;
        this.rows.sort((a, b) => place(a) - place(b));
      }
      this.spacer.style.height = `${this.rows.length * HEIGHT}px`;
      this.empty.hidden = this.rows.length > 0;
      for (const element of this.pool.values()) element.remove();
      this.pool.clear();
      this.redraw();
    }
    update(row) {
      for (const [place, element] of this.pool) {
        if (this.rows[place] === row) this.fill(element, row);
      }
    }
    later() {
      window.cancelAnimationFrame(this.drawn);
      this.drawn = window.requestAnimationFrame(() => this.redraw());
    }
    redraw() {
      const first = Math.max(0, Math.floor(this.scroller.scrollTop / HEIGHT) - SPARE);
      const last = Math.min(this.rows.length, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / HEIGHT) + SPARE);
      for (const [place, element] of this.pool) {
        if (place < first || place >= last) {
          element.remove();
          this.pool.delete(place);
        }
      }
      for (let place = first; place < last; place++) {
        let element = this.pool.get(place);
        if (!element) {
          element = this.make(place);
          this.pool.set(place, element);
          this.spacer.append(element);
        }
        element.classList.toggle("current", this.rows[place].key === this.current);
      }
    }
    make(place) {
      const row = this.rows[place];
      const element = document.createElement("button");
      element.type = "button";
      element.className = "row";
      element.tabIndex = -1;
      element.style.transform = `translateY(${place * HEIGHT}px)`;
      const picture2 = document.createElement("img");
      picture2.alt = "";
      picture2.loading = "lazy";
      picture2.decoding = "async";
      picture2.addEventListener("error", () => {
        picture2.removeAttribute("src");
        picture2.classList.add("broken");
      });
      const [text, name, note, sign] = ["span", "span", "span", "span"].map((kind) => document.createElement(kind));
      text.className = "text";
      name.className = "name";
      note.className = "note";
      sign.className = "sign";
      text.append(name, note);
      element.append(picture2, text, sign);
      element.addEventListener("click", () => this.picked(row.key));
      if (row.status !== "faulty") {
        window.setTimeout(() => {
          if (element.isConnected) picture2.src = `/api/images/${row.key}/picture?level=thumb`;
        }, 120);
      } else picture2.classList.add("broken");
      this.fill(element, row);
      return element;
    }
    fill(element, row) {
      const lesions = row.count ? `${row.count} lesion${row.count > 1 ? "s" : ""}` : "";
      const doubt = this.filter === "review" && row.status === "open" ? `doubt ${(this.doubts.get(row.key) ?? 0).toFixed(2)}` : "";
      element.dataset.status = row.status;
      element.title = row.id;
      element.querySelector(".name").textContent = row.id;
      element.querySelector(".note").textContent = doubt || (row.status === "unseen" ? "" : lesions) || WORDS[row.status];
      element.querySelector(".sign").textContent = SIGNS[row.status];
    }
  };
  function isToDo(row) {
    return row.status === "open" || row.status === "rejected";
  }

  // src/lesionsam/annotation/web/previews.ts
  var AGAIN = 250;
  var Previews = class {
    constructor(arrived) {
      this.arrived = arrived;
      this.results = /* @__PURE__ */ new Map();
      this.wanted = /* @__PURE__ */ new Map();
      this.isBusy = false;
    }
    clear() {
      this.results = /* @__PURE__ */ new Map();
      this.wanted.clear();
    }
    forget(id) {
      this.results.delete(id);
      this.wanted.delete(id);
    }
    ask(id, key, big, small, others) {
      this.wanted.delete(id);
      this.wanted.set(id, { key, big: [...big], small: small && [...small], others });
      void this.pump();
    }
    async pump() {
      if (this.isBusy) return;
      const next = [...this.wanted.entries()].pop();
      if (!next) return;
      const [id, want] = next;
      this.wanted.delete(id);
      this.isBusy = true;
      const results = this.results;
      try {
        const preview2 = await preview(want.key, id, want.big, want.small, want.others);
        if (results === this.results) {
          const isNewest = !this.wanted.has(id);
          results.set(id, preview2);
          this.arrived(id, preview2, isNewest);
          if (preview2.pending && isNewest) {
            window.setTimeout(() => {
              if (results === this.results && !this.wanted.has(id)) this.ask(id, want.key, want.big, want.small, want.others);
            }, AGAIN);
          }
        }
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
      } finally {
        this.isBusy = false;
      }
      void this.pump();
    }
  };

  // src/lesionsam/annotation/web/watch.ts
  var PAUSE = 2e4;
  var Watch = class {
    constructor() {
      this.last = 0;
      this.sum = 0;
    }
    /** Somebody did something. */
    tick(now = performance.now()) {
      if (this.last) this.sum += Math.min(now - this.last, PAUSE);
      this.last = now;
    }
    /** The image has changed: what was not credited to anything is dropped, looking at the next begins. */
    begin(now = performance.now()) {
      this.sum = 0;
      this.last = now;
    }
    /** Seconds since they were last taken. */
    take() {
      this.tick();
      const seconds = this.sum / 1e3;
      this.sum = 0;
      return seconds;
    }
  };

  // src/lesionsam/annotation/web/ui.ts
  function byId(id) {
    const found = document.getElementById(id);
    if (!found) throw new Error(`#${id} is missing`);
    return found;
  }
  function make(kind, className, text = "") {
    const element = document.createElement(kind);
    element.className = className;
    element.textContent = text;
    return element;
  }
  function showProgress(rows) {
    const able = rows.filter((row) => row.status !== "faulty");
    const done = able.filter((row) => !isToDo(row)).length;
    const bar = byId("progress");
    bar.setAttribute("aria-valuemax", String(able.length));
    bar.setAttribute("aria-valuenow", String(done));
    bar.querySelector("i").style.width = `${able.length ? 100 * done / able.length : 0}%`;
    bar.querySelector("span").textContent = `${done.toLocaleString("en")} of ${able.length.toLocaleString("en")} done`;
  }
  function showSaved(kind, text) {
    const element = byId("saved");
    element.dataset.kind = kind;
    element.textContent = text;
  }
  var toastTimer = 0;
  function toast(text) {
    const element = byId("toast");
    element.textContent = text;
    element.hidden = false;
    window.clearTimeout(toastTimer);
    toastTimer = window.setTimeout(() => {
      element.hidden = true;
    }, 3500);
  }
  function banner(text, choices = []) {
    const element = byId("banner");
    element.hidden = !text;
    element.querySelector("p").textContent = text;
    const buttons2 = choices.map((choice) => {
      const button = make("button", "choice", choice.text);
      button.type = "button";
      button.addEventListener("click", choice.run);
      return button;
    });
    element.querySelector(".choices")?.replaceChildren(...buttons2);
  }
  function hint(text, step) {
    const element = byId("hint");
    if (element.textContent !== text) element.textContent = text;
    element.dataset.step = step;
    element.hidden = !text;
  }
  function hintFor(editor, isTouch) {
    if (!editor) return ["", ""];
    const target = editor.drag?.started ? editor.drag.target.kind : "";
    if (target === "new") return ["Big box: rough extent, the whole lesion inside", "1"];
    if (target === "core") return ["Core: a box that lies inside the lesion", "2"];
    if (editor.waiting) return ["Drag the core inside it, or keep the suggested one", "2"];
    if (editor.forceNew) return ["Drag another big box", "1"];
    if (editor.ghosts.length) {
      return [isTouch ? "Proposed: accept it, or drag an edge to correct it" : "Proposed: A accepts, dragging an edge corrects, R rejects", "3"];
    }
    if (editor.lesions.some((each) => each.source === "automatic" && !each.agreed)) {
      return [isTouch ? "Accepted unseen: accept it, or drag an edge to correct it" : "Accepted unseen: A agrees, dragging an edge corrects", "3"];
    }
    if (editor.mark === "no_lesion") return ["Marked: no lesion", "0"];
    if (editor.mark === "cannot_tell") return ["Marked: cannot tell", "0"];
    if (!editor.lesions.length) return ["Drag a big box around the lesion", "1"];
    return [isTouch ? "" : "Enter: next image · drag outside: another lesion · ?: all keys", "0"];
  }
  var SOURCES = { drawn: "drawn", corrected: "corrected", accepted: "accepted", automatic: "automatic" };
  function showLesions(editor, previews, select, remove) {
    const cards = editor.lesions.map((lesion) => {
      const card = make("div", "lesion");
      card.classList.toggle("chosen", editor.selection?.id === lesion.id);
      card.addEventListener("click", () => select(lesion.id));
      const [w, h] = [lesion.big[2] - lesion.big[0], lesion.big[3] - lesion.big[1]];
      const top = make("div", "line");
      const bin = make("button", "plain bin", "✕");
      bin.type = "button";
      bin.setAttribute("aria-label", `Delete lesion ${lesion.id}`);
      bin.addEventListener("click", (event) => {
        event.stopPropagation();
        remove(lesion.id);
      });
      top.append(make("strong", "", `Lesion ${lesion.id}`), make("span", `chip ${lesion.source}`, SOURCES[lesion.source]), bin);
      const size = `${Math.round(w)} × ${Math.round(h)} px` + (lesion.core === "suggested" ? " · core suggested" : "") + (lesion.seconds >= 0.5 ? ` · ${Math.round(lesion.seconds)} s` : "");
      card.append(top, make("div", "fine", size));
      const preview2 = previews.get(lesion.id);
      if (preview2?.pending) card.append(make("div", "fine", "model: looking at the image…"));
      else if (preview2?.model) card.append(meters(preview2));
      return card;
    });
    byId("lesions").replaceChildren(...cards);
  }
  function meters(preview2) {
    const row = make("div", "meters");
    const add = (name, value, title) => {
      const item = make("div", "meter");
      item.title = title;
      const bar = make("i", "");
      const fill = make("b", "");
      fill.style.width = `${Math.round(Math.min(1, Math.max(0, value)) * 100)}%`;
      bar.append(fill);
      item.append(make("span", "", name), bar, make("span", "value", value.toFixed(2)));
      row.append(item);
    };
    if (preview2.agreement !== void 0) add("agreement", preview2.agreement, "IoU of the model's mask and the box prior's");
    if (preview2.model?.iou !== void 0) add("predicted IoU", preview2.model.iou, "the model's own estimate of its mask");
    return row;
  }
  function showProposal(proposal, isShown) {
    const element = byId("proposal");
    element.hidden = !isShown || !proposal;
    if (!proposal) return;
    element.replaceChildren(
      make("strong", "", "Proposal"),
      make("span", "chip proposed", `doubt ${proposal.doubt.toFixed(2)}`),
      make("div", "fine", proposal.why.join(" · ") || "nothing odd about it")
    );
  }

  // src/lesionsam/annotation/web/app.ts
  var NARROW = "(max-width: 1100px)";
  var POLL = 2e3;
  var AHEAD = 3;
  var SETTLE = 350;
  var SHARP = 1.2;
  var App = class {
    constructor(canvas) {
      this.canvas = canvas;
      this.rows = [];
      this.row = null;
      this.editor = null;
      this.view = new View();
      this.look = { contrast: 1, gamma: 1 };
      this.shown = { model: true, prior: true, fill: true, boxes: true };
      this.pointer = null;
      this.isTouch = window.matchMedia("(pointer: coarse)").matches;
      this.watch = new Watch();
      this.byKey = /* @__PURE__ */ new Map();
      this.pictures = new Pictures();
      this.previews = new Previews((id, preview2, isNewest) => this.previewArrived(id, preview2, isNewest));
      this.picture = null;
      this.details = /* @__PURE__ */ new Map();
      this.fitted = true;
      this.frame = 0;
      this.settle = 0;
      this.nudged = false;
      this.opening = 0;
      this.asked = { at: 0, boxes: "" };
      // when the boxes were last let go of
      this.connected = true;
      this.tableProblem = "";
      this.imageProblem = "";
      this.ghosts = [];
      this.proposalSeen = false;
      this.numProposed = 0;
      this.list = new List(byId("scroller"), byId("spacer"), byId("empty"), (key) => {
        if (window.matchMedia(NARROW).matches) document.body.classList.add("list-away");
        void this.open(key);
      });
      new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
    }
    async start() {
      this.session = await session();
      this.rows = this.session.images.map(([key, id, status, count, revision]) => ({ key, id, status, count, revision }));
      this.byKey = new Map(this.rows.map((row) => [row.key, row]));
      document.title = `${this.session.title} · LesionSAM`;
      byId("title").textContent = this.session.title;
      document.body.classList.toggle("with-model", this.session.model !== null);
      this.saver = new Saver(this.session.store, {
        saved: (key, state, isLast) => this.saved(key, state, isLast),
        failed: (key, problem, theirs) => this.failed(key, problem, theirs)
      });
      this.list.setRows(this.rows);
      showProgress(this.rows);
      this.tableProblem = this.session.problem;
      const restored = this.saver.restore();
      if (restored) toast(`${restored} change${restored > 1 ? "s" : ""} of an earlier visit ${restored > 1 ? "are" : "is"} being saved`);
      this.showState();
      const first = this.byKey.get(location.hash.slice(1)) ?? this.resume() ?? this.rows[0];
      if (first) await this.open(first.key);
      window.setTimeout(() => void this.poll(), POLL);
    }
    /** Where one stopped: the image that was open last, or the first one after it that is to do. */
    resume() {
      const last = this.rows.findIndex((row) => row.key === localStorage.getItem(`lesionsam-last:${this.session.store}`));
      const open = [...this.rows.slice(Math.max(0, last)), ...this.rows.slice(0, Math.max(0, last))];
      return open.find((row) => row.status === "open") ?? this.rows[Math.max(0, last)];
    }
    // ------------------------------------------------------------------------------------------------------ opening
    async open(key) {
      const row = this.byKey.get(key);
      if (!row) return;
      const started = performance.now();
      this.flush();
      const turn = ++this.opening;
      this.row = row;
      history.replaceState(null, "", `#${key}`);
      try {
        localStorage.setItem(`lesionsam-last:${this.session.store}`, key);
      } catch {
      }
      this.list.setCurrent(key);
      byId("name").textContent = row.id;
      let detail2;
      let bitmap;
      const waiting = window.setTimeout(() => {
        if (turn === this.opening) hint("Opening…", "0");
      }, 150);
      try {
        [detail2, bitmap] = await Promise.all([this.detail(row), this.pictures.get(key)]);
      } catch (error) {
        if (turn === this.opening) this.cannotOpen(row, error);
        return;
      } finally {
        window.clearTimeout(waiting);
      }
      if (turn !== this.opening) return;
      this.details.delete(key);
      this.imageProblem = detail2.problem;
      const kept = this.saver.snapshotOf(key);
      this.previews.clear();
      this.ghosts = [];
      this.proposalSeen = kept?.inSight ?? false;
      this.editor = new Editor(
        detail2.width,
        detail2.height,
        kept ?? detail2.state,
        detail2.proposal,
        (live, id) => this.changed(live, id)
      );
      row.revision = detail2.state.revision;
      this.picture = { bitmap, seen: adjusted(bitmap, this.look), level: "view" };
      this.fit();
      byId("facts").textContent = `${detail2.width} × ${detail2.height} px` + (detail2.state.by ? ` · ${detail2.state.by}, ${detail2.state.at.slice(0, 10)}` : "");
      for (const lesion of this.editor.lesions) this.askPreview(lesion.id);
      this.askGhosts();
      this.showState();
      this.watch.begin();
      this.canvas.dataset.image = row.id;
      window.requestAnimationFrame(() => {
        this.canvas.dataset.openMs = (performance.now() - started).toFixed(1);
      });
      this.lookAhead();
    }
    cannotOpen(row, error) {
      if (!(error instanceof Problem)) throw error;
      this.details.delete(row.key);
      this.imageProblem = "";
      this.editor = null;
      this.picture = null;
      this.previews.clear();
      byId("facts").textContent = "";
      byId("lesions").replaceChildren();
      this.showState();
      banner(error.message, [
        { text: "Try again", run: () => void this.open(row.key) },
        { text: "Next image", run: () => this.step(1) }
      ]);
      this.repaint();
    }
    detail(row) {
      let found = this.details.get(row.key);
      if (!found) {
        found = detail(row.key);
        found.catch(() => this.details.delete(row.key));
        this.details.set(row.key, found);
      }
      return found;
    }
    lookAhead() {
      const place = this.list.rows.findIndex((row) => row.key === this.row?.key);
      const next = this.list.rows.slice(place + 1, place + 1 + AHEAD);
      const open = this.nextOpen();
      const wanted = [...open && !next.includes(open) ? [open] : [], ...next, ...this.list.rows.slice(Math.max(0, place - 1), place)];
      for (const row of wanted) {
        if (row.status === "faulty") continue;
        this.pictures.get(row.key).catch(() => void 0);
        this.detail(row).catch(() => void 0);
      }
      if (this.session.model) {
        const keys = [...this.row ? [this.row.key] : [], ...wanted.map((row) => row.key)];
        prepare(keys.slice(0, 8)).catch(() => void 0);
      }
    }
    step(by) {
      const rows = this.list.rows;
      if (!rows.length) return;
      const place = rows.findIndex((row) => row.key === this.row?.key);
      const next = rows[Math.min(rows.length - 1, Math.max(0, place < 0 ? 0 : place + by))];
      if (next && next !== this.row) void this.open(next.key);
    }
    nextOpen() {
      const rows = this.list.rows.length ? this.list.rows : this.rows;
      const place = rows.findIndex((row) => row.key === this.row?.key);
      const isWanted = (row) => isToDo(row) || this.list.filter === "review" && row.status === "unseen";
      return [...rows.slice(place + 1), ...rows.slice(0, Math.max(0, place))].find(isWanted);
    }
    /** Done with this image; the next one that needs somebody. */
    finish() {
      this.flush();
      if (this.editor?.ghosts.length) {
        this.accept();
        return;
      }
      const next = this.nextOpen();
      if (next) void this.open(next.key);
      else toast("Nothing is left to do in this list.");
    }
    // ------------------------------------------------------------------------------------------------------ changing
    /** The editor's boxes changed: live while a drag or a nudge goes on, else for good. */
    changed(live, id) {
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
        this.nudged = true;
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
    get key() {
      return this.row?.key ?? "";
    }
    others(id) {
      return (this.editor?.lesions ?? []).filter((each) => each.id !== id).map((each) => each.big);
    }
    askPreview(id) {
      const lesion = this.editor?.lesion(id);
      if (lesion) this.previews.ask(id, this.key, lesion.big, lesion.small, this.others(id));
    }
    // of the image that is open
    askGhosts() {
      this.editor?.ghosts.forEach((ghost, index) => {
        this.previews.ask(`ghost${index}`, this.key, ghost.big, ghost.small, []);
      });
    }
    previewArrived(id, preview2, isNewest) {
      const lesion = this.editor?.lesion(id);
      if (id.startsWith("ghost")) this.ghosts[Number(id.slice(5))] = preview2;
      if (lesion && lesion.core === "suggested" && isNewest && (this.nudged || !same(lesion.small, preview2.small))) {
        this.editor?.suggested(id, preview2.small);
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
    nudge(dx, dy, resize) {
      const done = this.editor?.nudge(dx, dy, resize, this.nudged) ?? false;
      if (done) {
        this.nudged = true;
        showSaved("saving", "saving…");
        window.clearTimeout(this.settle);
        this.settle = window.setTimeout(() => this.flush(), SETTLE);
      }
      return done;
    }
    /** Save what is still waiting for a pause. */
    flush() {
      window.clearTimeout(this.settle);
      if (!this.nudged) return;
      this.nudged = false;
      this.save(this.editor?.selection?.id ?? null);
      this.showState();
    }
    save(id) {
      if (!this.editor || !this.row) return;
      const credited = id && this.editor.lesion(id) ? id : this.editor.lesions[0]?.id ?? "";
      const snapshot = { ...this.editor.snapshot(), inSight: this.proposalSeen };
      this.saver.save(this.row.key, this.row.revision, snapshot, { [credited]: this.watch.take() });
      this.note(this.row, snapshot);
    }
    /** What the list shows of an image, before the server has answered. */
    note(row, snapshot) {
      row.count = snapshot.lesions.length;
      const isUnseen = snapshot.lesions.some((each) => each.source === "automatic" && !each.agreed);
      row.status = isUnseen ? "unseen" : row.count ? "done" : snapshot.mark || "open";
      this.list.update(row);
      showProgress(this.rows);
    }
    mark(mark) {
      if (!this.editor) return;
      this.flush();
      this.editor.setMark(this.editor.mark === mark ? "" : mark);
      if (mark !== "rejected" && this.editor.mark) window.setTimeout(() => this.finish(), 120);
    }
    reject() {
      if (this.editor?.ghosts.length || this.editor?.lesions.some((each) => each.source !== "drawn")) this.mark("rejected");
    }
    accept() {
      if (!this.editor) return;
      this.flush();
      if (this.editor.accept()) window.setTimeout(() => this.finish(), 120);
      else if (this.editor.lesions.length) this.finish();
    }
    // ------------------------------------------------------------------------------------------------------ saved
    saved(key, state, isLast) {
      const row = this.byKey.get(key);
      this.details.delete(key);
      if (!row) return;
      row.revision = state.revision;
      if (isLast) {
        row.status = state.status;
        row.count = state.lesions.length;
        if (row === this.row) {
          this.editor?.adopt(state);
          this.imageProblem = "";
        }
      }
      this.connected = true;
      this.list.update(row);
      if (row === this.row && !this.editor?.drag) this.showPanel();
      this.showState();
    }
    failed(key, problem, theirs) {
      if (!theirs) this.connected = !problem.startsWith("no connection");
      if (theirs && this.row?.key !== key) toast(`${this.byKey.get(key)?.id ?? "An image"}: ${problem}`);
      this.showState();
    }
    async poll() {
      try {
        const news = await changes(this.session.clock);
        if (!this.connected) toast("Connected again.");
        this.connected = true;
        this.session.clock = news.clock;
        this.tableProblem = news.problem;
        for (const [key, status, count, revision] of news.changed) await this.changedElsewhere(key, status, count, revision);
        if (news.changed.length) showProgress(this.rows);
        if (news.proposed !== this.numProposed) await this.readQueue(news.proposed);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        this.connected = error.status !== 0;
        if (error.status !== 0) this.tableProblem = error.message;
      }
      this.showState();
      window.setTimeout(() => void this.poll(), document.hidden ? 4 * POLL : POLL);
    }
    async readQueue(count) {
      const queue2 = await queue();
      this.numProposed = count;
      this.details.clear();
      this.list.doubts = new Map(queue2.images);
      if (this.list.filter === "review") this.list.refresh();
    }
    async changedElsewhere(key, status, count, revision) {
      const row = this.byKey.get(key);
      if (!row || revision <= row.revision || this.saver.snapshotOf(key)) return;
      Object.assign(row, { status, count });
      this.details.delete(key);
      this.list.update(row);
      if (row !== this.row || !this.editor || this.editor.drag || this.nudged) return;
      const detail2 = await this.detail(row).catch((error) => {
        if (!(error instanceof Problem)) throw error;
        return null;
      });
      const editor = this.editor;
      if (!detail2 || !editor || row !== this.row || editor.drag || this.saver.snapshotOf(key)) return;
      row.revision = detail2.state.revision;
      editor.replace(detail2.state);
      for (const lesion of editor.lesions) this.askPreview(lesion.id);
      toast(`${detail2.state.by} changed this image; shown as it is now.`);
    }
    /** Banner, save state, hint and panel say what is so. */
    showState() {
      const unsaved = this.saver.unsaved;
      const trouble = this.row ? this.saver.problemOf(this.row.key) : null;
      const kept = "What you drew is kept in this browser.";
      if (trouble?.theirs) {
        banner(`${trouble.problem}. Your boxes are still here.`, [
          { text: "Keep mine", run: () => this.resolve(true) },
          { text: "Take theirs", run: () => this.resolve(false) }
        ]);
      } else if (!this.connected) banner(`No connection to the page's server; was it ended? ${kept} It is saved as soon as the server is back.`);
      else if (trouble) banner(`Not saved: ${trouble.problem}. ${trouble.problem.includes("kept here") ? "" : kept}`);
      else if (this.tableProblem) banner(this.tableProblem);
      else if (this.editor) banner(this.imageProblem);
      if (unsaved.some((key) => this.saver.problemOf(key))) showSaved("unsaved", `${unsaved.length} not saved`);
      else if (unsaved.length || this.nudged) showSaved("saving", "saving…");
      else showSaved("saved", "all saved");
      hint(...hintFor(this.editor, this.isTouch));
      this.showPanel();
      this.repaint();
    }
    resolve(mine) {
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
    showPanel() {
      const editor = this.editor;
      for (const [name, able] of [
        ["undo", editor?.canUndo],
        ["redo", editor?.canRedo],
        ["accept", editor?.ghosts.length || editor?.lesions.some((each) => each.source === "automatic")],
        ["reject", editor?.ghosts.length || editor?.lesions.some((each) => each.source !== "drawn")],
        ["no-lesion", editor],
        ["cannot-tell", editor]
      ]) {
        for (const button of document.querySelectorAll(`[data-run="${name}"]`)) button.disabled = !able;
      }
      for (const name of ["no-lesion", "cannot-tell"]) {
        const button = document.querySelector(`[data-run="${name}"]`);
        button?.classList.toggle("on", editor?.mark === name.replace("-", "_"));
      }
      if (!editor) return;
      if (editor.ghosts.length || editor.lesions.some((each) => each.source === "automatic")) this.proposalSeen = true;
      showProposal(editor.proposal, editor.ghosts.length > 0);
      showLesions(editor, this.previews.results, (id) => {
        editor.selection = { id, part: "big" };
        this.showState();
      }, (id) => editor.remove(id));
    }
    // ------------------------------------------------------------------------------------------------------ seeing
    resize() {
      const { clientWidth, clientHeight } = this.canvas.parentElement;
      const ratio = window.devicePixelRatio || 1;
      this.canvas.width = Math.round(clientWidth * ratio);
      this.canvas.height = Math.round(clientHeight * ratio);
      this.canvas.style.width = `${clientWidth}px`;
      this.canvas.style.height = `${clientHeight}px`;
      if (this.fitted) this.fit();
      this.repaint();
    }
    fit() {
      if (!this.editor) return;
      this.view.fit(this.editor.width, this.editor.height, this.canvas.clientWidth, this.canvas.clientHeight);
      this.fitted = true;
      this.repaint();
    }
    zoom(factor, at) {
      if (!this.editor) return;
      const fit = new View();
      fit.fit(this.editor.width, this.editor.height, this.canvas.clientWidth, this.canvas.clientHeight);
      this.view.zoom(factor, at ?? { x: this.canvas.clientWidth / 2, y: this.canvas.clientHeight / 2 }, fit.scale * 0.5);
      this.pan(0, 0);
      void this.sharpen();
    }
    pan(dx, dy) {
      if (!this.editor) return;
      this.view.x += dx;
      this.view.y += dy;
      this.view.keep(this.editor.width, this.editor.height, this.canvas.clientWidth, this.canvas.clientHeight);
      this.fitted = false;
      this.repaint();
    }
    /** The whole picture, once it is looked at closely enough. */
    async sharpen() {
      const [row, now, editor] = [this.row, this.picture, this.editor];
      if (!row || !now || !editor || now.level === "full" || now.bitmap.width >= editor.width) return;
      if (this.view.scale * window.devicePixelRatio * editor.width / now.bitmap.width < SHARP) return;
      const bitmap = await this.pictures.get(row.key, "full").catch(() => null);
      if (!bitmap || this.row !== row) return;
      this.picture = { bitmap, seen: adjusted(bitmap, this.look), level: "full" };
      this.repaint();
    }
    setLook(look2) {
      Object.assign(this.look, look2);
      if (this.picture) this.picture.seen = adjusted(this.picture.bitmap, this.look);
      this.repaint();
    }
    /** Pixels of the image that a finger or a pointer reaches, and that a drag must exceed. */
    reach(isCoarse) {
      return { handle: (isCoarse ? 18 : 8) / this.view.scale, start: (isCoarse ? 8 : 4) / this.view.scale };
    }
    /** The part of the image that is in sight. */
    get seen() {
      const a = this.view.toImage({ x: 0, y: 0 });
      const b = this.view.toImage({ x: this.canvas.clientWidth, y: this.canvas.clientHeight });
      return [Math.max(0, a.x), Math.max(0, a.y), Math.min(this.editor?.width ?? 1, b.x), Math.min(this.editor?.height ?? 1, b.y)];
    }
    repaint() {
      if (this.frame) return;
      this.frame = window.requestAnimationFrame(() => {
        this.frame = 0;
        const context = this.canvas.getContext("2d");
        if (!context) return;
        draw({
          context,
          width: this.canvas.clientWidth,
          height: this.canvas.clientHeight,
          ratio: window.devicePixelRatio || 1,
          view: this.view,
          picture: this.picture?.seen ?? null,
          editor: this.editor,
          previews: this.previews.results,
          ghosts: this.ghosts,
          shown: this.shown,
          pointer: this.isTouch ? null : this.pointer,
          handle: this.isTouch ? 16 : 9
        });
        this.canvas.dataset.view = [this.view.scale, this.view.x, this.view.y].join(",");
        byId("scale").textContent = `${Math.round(this.view.scale * 100)} %`;
      });
    }
  };

  // src/lesionsam/annotation/web/help.ts
  var ORDER = ["Draw", "Change", "Decide", "Move about", "Look"];
  var GESTURES = [
    ["Draw", "drag", "big box: rough extent, the lesion lies inside it"],
    ["Draw", "drag inside it", "core: a box that lies inside the lesion"],
    ["Draw", "Shift drag", "another big box, also over one that is there"],
    ["Change", "drag edge or corner", "resize; the core stays inside the big box"],
    ["Change", "drag inside", "move the core, or the lesion as a whole"],
    ["Decide", "list Review", "proposals, the doubtful first; then what was accepted unseen"],
    ["Look", "wheel, two fingers", "zoom; two fingers also move the picture"],
    ["Look", "Space drag, right drag", "move the picture"]
  ];
  function keyName(event) {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const isSign = event.key.length === 1 && !/[a-z0-9 ]/i.test(event.key);
    const parts = [
      event.ctrlKey || event.metaKey ? "Ctrl" : "",
      event.altKey ? "Alt" : "",
      event.shiftKey && !isSign ? "Shift" : "",
      key
    ];
    return parts.filter(Boolean).join("+");
  }
  function fillHelp(container, bindings2) {
    container.replaceChildren();
    for (const group of ORDER) {
      const section = document.createElement("section");
      const title = document.createElement("h3");
      title.textContent = group;
      const list = document.createElement("dl");
      const lines = [
        ...GESTURES.filter((each) => each[0] === group).map((each) => [each[1], each[2]])
      ];
      for (const [shown, what] of lines) list.append(...line([shown], what, "gesture"));
      for (const each of bindings2.filter((binding) => binding.group === group)) {
        list.append(...line(each.shown.split(" "), each.what, "key"));
      }
      section.append(title, list);
      container.append(section);
    }
  }
  function line(names, what, kind) {
    const term = document.createElement("dt");
    for (const name of names) {
      const key = document.createElement(kind === "key" ? "kbd" : "span");
      key.textContent = name;
      term.append(key);
    }
    const text = document.createElement("dd");
    text.textContent = what;
    return [term, text];
  }

  // src/lesionsam/annotation/web/input.ts
  function bindings(app) {
    const make2 = (group, keys, shown, what, run) => ({ group, keys, shown, what, run });
    const arrows = (modifier, by, resize) => [["ArrowLeft", -by, 0], ["ArrowRight", by, 0], ["ArrowUp", 0, -by], ["ArrowDown", 0, by]].map(([key, dx, dy]) => make2("", [modifier + key], "", "", () => {
      if (!app.nudge(dx, dy, resize) && !modifier && dx) app.step(Math.sign(dx));
    }));
    const chosen = () => app.editor?.selection?.id ?? app.editor?.waiting ?? app.editor?.lesions[0]?.id ?? null;
    const withChosen = (run) => () => {
      const id = chosen();
      if (id !== null) run(id);
    };
    return [
      make2("Draw", ["b"], "B", "a big box in the middle, to be moved by keys", () => app.editor?.addInside(app.seen)),
      make2("Draw", ["c"], "C", "draw the core again with the next drag", withChosen((id) => {
        app.editor?.drawCore(id);
        app.showState();
      })),
      make2("Draw", ["s"], "S", "suggest the core again from the big box", withChosen((id) => app.editor?.askForCore(id))),
      make2("Change", ["Tab"], "Tab", "select the next box", () => {
        app.flush();
        app.editor?.cycle(1);
        app.showState();
      }),
      make2("Change", ["Shift+Tab"], "Shift+Tab", "select the box before", () => {
        app.flush();
        app.editor?.cycle(-1);
        app.showState();
      }),
      make2("Change", [], "←↑→↓", "move the selected box by a pixel; with Shift by ten", () => void 0),
      make2("Change", [], "Ctrl+←↑→↓", "resize it by its lower right corner; with Shift by ten", () => void 0),
      ...arrows("", 1, false),
      ...arrows("Shift+", 10, false),
      ...arrows("Ctrl+", 1, true),
      ...arrows("Ctrl+Shift+", 10, true),
      make2(
        "Change",
        ["Delete", "Backspace"],
        "Del",
        "delete the selected lesion",
        () => {
          if (app.editor?.selection) app.editor.remove(app.editor.selection.id);
        }
      ),
      make2("Change", ["Ctrl+z"], "Ctrl+Z", "undo", () => {
        app.flush();
        app.editor?.undo();
      }),
      make2("Change", ["Ctrl+Shift+z", "Ctrl+y"], "Ctrl+Shift+Z Ctrl+Y", "redo", () => {
        app.flush();
        app.editor?.redo();
      }),
      make2("Change", ["Escape"], "Esc", "give up the drag, select nothing", () => {
        app.editor?.cancel();
        app.showState();
      }),
      make2("Decide", ["Enter"], "Enter", "accept what is proposed, or go to the next image to do", () => app.finish()),
      make2("Decide", ["a"], "A", "accept the proposal", () => app.accept()),
      make2("Decide", ["r"], "R", "reject the proposal; the image is to be drawn", () => app.reject()),
      make2("Decide", ["x"], "X", "no lesion in this image", () => app.mark("no_lesion")),
      make2("Decide", ["t"], "T", "cannot tell", () => app.mark("cannot_tell")),
      make2("Move about", ["PageDown", "n"], "N PageDown", "next image", () => app.step(1)),
      make2("Move about", ["PageUp", "p"], "P PageUp", "previous image", () => app.step(-1)),
      make2("Move about", ["Home"], "Home", "first image", () => app.step(-1e9)),
      make2("Move about", ["End"], "End", "last image", () => app.step(1e9)),
      make2("Move about", ["/"], "/", "find an image by name", () => byId("search").focus()),
      make2("Move about", ["f"], "F", "next list: all, to do, review, done", () => cycleFilter(app)),
      make2("Move about", ["l"], "L", "show or hide the list", () => document.body.classList.toggle("list-away")),
      make2("Look", ["+", "="], "+", "zoom in", () => app.zoom(1.3)),
      make2("Look", ["-"], "−", "zoom out", () => app.zoom(1 / 1.3)),
      make2("Look", ["0"], "0", "the whole image", () => app.fit()),
      make2("Look", ["1"], "1", "one pixel of the image on one of the screen", () => app.zoom(1 / app.view.scale)),
      ...[["Alt+ArrowLeft", 60, 0], ["Alt+ArrowRight", -60, 0], ["Alt+ArrowUp", 0, 60], ["Alt+ArrowDown", 0, -60]].map(([key, dx, dy]) => make2("", [key], "", "", () => app.pan(dx, dy))),
      make2("Look", [], "Alt+←↑→↓", "move the picture", () => void 0),
      make2("Look", ["m"], "M", "masks: both, model, box prior, none", () => cycleMasks(app)),
      make2("Look", ["h"], "H", "hide or show the boxes", () => flip(app, "boxes")),
      make2("Look", ["k"], "K", "more contrast; with Shift less", () => look(app, "contrast", 0.15)),
      make2("", ["Shift+k"], "", "", () => look(app, "contrast", -0.15)),
      make2("Look", ["g"], "G", "lift the dark (gamma); with Shift lower it", () => look(app, "gamma", 0.15)),
      make2("", ["Shift+g"], "", "", () => look(app, "gamma", -0.15)),
      make2("Look", ["v"], "V", "contrast and gamma as they were", () => resetLook(app)),
      make2("Look", ["?", "F1"], "?", "this help", () => openHelp())
    ];
  }
  function cycleFilter(app) {
    const place = FILTERS.findIndex(([name]) => name === app.list.filter);
    setFilter(app, FILTERS[(place + 1) % FILTERS.length][0]);
  }
  function setFilter(app, filter) {
    app.list.setFilter(filter);
    for (const button of byId("filters").children) {
      button.setAttribute("aria-selected", String(button.dataset.filter === filter));
    }
  }
  function cycleMasks(app) {
    const states = app.session.model ? [[true, true], [true, false], [false, true], [false, false]] : [[true, true], [false, false]];
    const now = states.findIndex(([model, prior]) => model === app.shown.model && prior === app.shown.prior);
    [app.shown.model, app.shown.prior] = states[(now + 1) % states.length];
    showSwitches(app);
  }
  function flip(app, name) {
    app.shown[name] = !app.shown[name];
    showSwitches(app);
  }
  function look(app, name, by) {
    const input = byId(name);
    app.setLook({ [name]: Math.min(Number(input.max), Math.max(Number(input.min), app.look[name] + by)) });
    showSwitches(app);
  }
  function resetLook(app) {
    app.setLook({ contrast: 1, gamma: 1 });
    showSwitches(app);
  }
  function openHelp() {
    const dialog = byId("help");
    if (dialog.open) dialog.close();
    else dialog.showModal();
  }
  function showSwitches(app) {
    for (const name of ["model", "prior", "fill", "boxes"]) {
      byId(`show-${name}`).checked = app.shown[name];
    }
    for (const name of ["contrast", "gamma"]) {
      const input = byId(name);
      input.value = String(app.look[name]);
      input.nextElementSibling.textContent = app.look[name].toFixed(2);
    }
    app.repaint();
  }
  function bindKeys(app) {
    const all = bindings(app);
    const byKey = new Map(all.flatMap((each) => each.keys.map((key) => [key, each.run])));
    fillHelp(byId("keys"), all.filter((each) => each.shown));
    window.addEventListener("keydown", (event) => {
      const target = event.target;
      const dialog = byId("help");
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
  var PALM = 700;
  function bindPointers(app, canvas) {
    const fingers = /* @__PURE__ */ new Map();
    let drawing = null;
    let [penSeen, penDown] = [-Infinity, false];
    let panned = null;
    const place = (event) => {
      const frame = canvas.getBoundingClientRect();
      return { x: event.clientX - frame.left, y: event.clientY - frame.top };
    };
    const reach = (event) => app.reach(event.pointerType !== "mouse");
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "pen") {
        [penSeen, penDown] = [event.timeStamp, true];
        fingers.clear();
        if (app.editor?.drag) app.editor.cancel();
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
    const up = (event) => {
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
    canvas.addEventListener("pointerleave", () => {
      app.pointer = null;
      app.repaint();
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const unit = event.deltaMode === 1 ? 30 : 1;
      app.zoom(Math.exp(-event.deltaY * unit / (event.ctrlKey ? 120 : 500)), place(event));
    }, { passive: false });
  }
  var CURSORS = {
    n: "ns-resize",
    s: "ns-resize",
    e: "ew-resize",
    w: "ew-resize",
    nw: "nwse-resize",
    se: "nwse-resize",
    ne: "nesw-resize",
    sw: "nesw-resize",
    move: "move"
  };
  function cursor(app, p) {
    if (document.body.classList.contains("panning")) return "grab";
    const target = app.editor?.targetAt(app.view.toImage(p), app.reach(false).handle);
    return target && "handle" in target ? CURSORS[target.handle] : "crosshair";
  }

  // src/lesionsam/annotation/web/main.ts
  function buttons(app) {
    const runs = {
      "zoom-in": () => app.zoom(1.3),
      "zoom-out": () => app.zoom(1 / 1.3),
      fit: () => app.fit(),
      undo: () => {
        app.flush();
        app.editor?.undo();
      },
      redo: () => {
        app.flush();
        app.editor?.redo();
      },
      accept: () => app.accept(),
      reject: () => app.reject(),
      "no-lesion": () => app.mark("no_lesion"),
      "cannot-tell": () => app.mark("cannot_tell"),
      previous: () => app.step(-1),
      next: () => app.step(1),
      "next-open": () => app.finish()
    };
    for (const button of document.querySelectorAll("[data-run]")) {
      button.tabIndex = -1;
      button.addEventListener("click", () => {
        app.watch.tick();
        runs[button.dataset.run ?? ""]?.();
      });
    }
  }
  function settings(app) {
    for (const name of ["contrast", "gamma"]) {
      byId(name).addEventListener("input", (event) => {
        app.setLook({ [name]: Number(event.target.value) });
        showSwitches(app);
      });
    }
    for (const name of ["model", "prior", "fill", "boxes"]) {
      byId(`show-${name}`).addEventListener("change", (event) => {
        app.shown[name] = event.target.checked;
        app.repaint();
      });
    }
    const filters = byId("filters");
    for (const [name, text] of FILTERS) {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.textContent = text;
      tab.dataset.filter = name;
      tab.setAttribute("role", "tab");
      tab.tabIndex = -1;
      tab.addEventListener("click", () => setFilter(app, name));
      filters.append(tab);
    }
    setFilter(app, "all");
    byId("search").addEventListener("input", (event) => app.list.setSearch(event.target.value));
    byId("menu").addEventListener("click", () => document.body.classList.toggle("list-away"));
    byId("look-button").addEventListener("click", (event) => {
      event.currentTarget.setAttribute("aria-expanded", String(document.body.classList.toggle("look-open")));
    });
    byId("help-button").addEventListener("click", () => byId("help").showModal());
    const who = byId("who");
    const known = localStorage.getItem("lesionsam-who");
    who.value = known || app.session.who;
    app.saver.who = who.value.trim();
    who.addEventListener("change", () => {
      app.saver.who = who.value.trim();
      localStorage.setItem("lesionsam-who", app.saver.who);
    });
  }
  async function main() {
    const canvas = byId("canvas");
    const app = new App(canvas);
    if (window.matchMedia(NARROW).matches) document.body.classList.add("list-away");
    window.addEventListener("beforeunload", (event) => {
      app.flush();
      if (app.saver.unsaved.some((key) => app.saver.problemOf(key))) event.preventDefault();
    });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) app.flush();
    });
    try {
      await app.start();
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      banner(error.message, [{ text: "Load again", run: () => location.reload() }]);
      return;
    }
    settings(app);
    bindKeys(app);
    bindPointers(app, canvas);
    buttons(app);
    showSwitches(app);
    app.showState();
    document.body.dataset.ready = "true";
  }
  void main();
})();
