// What the canvas shows: picture, masks, boxes, handles. Colours as in the project's overlays (Okabe and Ito 2008).

import type { Editor } from "./editor";
import type { View } from "./geometry";
import type { Box, Lesion, Preview } from "./types";

export const MODEL = "#f0e442";
export const PRIOR = "#56b4e9";
const RIM = "rgba(10, 10, 10, 0.75)";
const WHITE = "#ffffff";

export interface Shown {
  model: boolean;
  prior: boolean;
  fill: boolean;
  boxes: boolean;
}

export interface Scene {
  context: CanvasRenderingContext2D;
  width: number;
  height: number;
  ratio: number;
  view: View;
  picture: CanvasImageSource | null;
  editor: Editor | null;
  previews: Map<string, Preview>;
  ghosts: Preview[];
  shown: Shown;
  pointer: { x: number; y: number } | null;
  handle: number;
}

export function draw(scene: Scene): void {
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

/** The box that is worked on stands out. */
function dim(scene: Scene, editor: Editor): void {
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

function onScreen(scene: Scene, box: Box): Box {
  const a = scene.view.toScreen({ x: box[0], y: box[1] });
  const b = scene.view.toScreen({ x: box[2], y: box[3] });
  return [a.x, a.y, b.x, b.y];
}

function outline(scene: Scene, box: Box, colour: string, dash: number[], width: number): void {
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

function path(scene: Scene, rings: number[][]): void {
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

function drawMask(scene: Scene, preview: Preview | undefined): void {
  if (!preview) return;
  const { context, shown } = scene;
  const layers: [number[][], string, boolean][] = [];
  const both = shown.model && shown.prior && preview.model;
  if (shown.prior || !preview.model) layers.push([preview.prior.rings, PRIOR, !both]);
  if (shown.model && preview.model) layers.push([preview.model.rings, MODEL, true]);
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

function drawLesion(scene: Scene, editor: Editor, lesion: Lesion): void {
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

function handles(scene: Scene, box: Box): void {
  const { context } = scene;
  const [x0, y0, x1, y1] = onScreen(scene, box);
  const [xm, ym] = [(x0 + x1) / 2, (y0 + y1) / 2];
  const side = scene.handle;
  const points: [number, number][] = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
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

/** Where a suggested core is taken hold of. */
function grip(scene: Scene, box: Box): void {
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

function tag(scene: Scene, lesion: Lesion): void {
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

function drawGhosts(scene: Scene, editor: Editor): void {
  editor.ghosts.forEach((ghost, index) => {
    drawMask(scene, scene.ghosts[index]);
    if (!scene.shown.boxes) return;
    outline(scene, ghost.big, MODEL, [3, 4], 1.8);
    outline(scene, ghost.small, MODEL, [2, 3], 1.5);
  });
}

function cross(scene: Scene, editor: Editor): void {
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
