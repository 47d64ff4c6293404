// What stands around the canvas: progress, hints, messages, the panel of the open image.

import type { Editor } from "./editor";
import type { Proposal, Preview, Row } from "./types";
import { isToDo } from "./list";

export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`#${id} is missing`);
  return found as T;
}

function make(kind: string, className: string, text = ""): HTMLElement {
  const element = document.createElement(kind);
  element.className = className;
  element.textContent = text;
  return element;
}

export function showProgress(rows: Row[]): void {
  const able = rows.filter((row) => row.status !== "faulty");
  const done = able.filter((row) => !isToDo(row)).length;
  const bar = byId("progress");
  bar.setAttribute("aria-valuemax", String(able.length));
  bar.setAttribute("aria-valuenow", String(done));
  (bar.querySelector("i") as HTMLElement).style.width = `${able.length ? (100 * done) / able.length : 0}%`;
  (bar.querySelector("span") as HTMLElement).textContent = `${done.toLocaleString("en")} of ${able.length.toLocaleString("en")} done`;
}

export type SavedKind = "saved" | "saving" | "unsaved";

export function showSaved(kind: SavedKind, text: string): void {
  const element = byId("saved");
  element.dataset.kind = kind;
  element.textContent = text;
}

let toastTimer = 0;

export function toast(text: string): void {
  const element = byId("toast");
  element.textContent = text;
  element.hidden = false;
  window.clearTimeout(toastTimer);
  toastTimer = window.setTimeout(() => { element.hidden = true; }, 3500);
}

export interface Choice {
  text: string;
  run: () => void;
}

/** A sentence that stays until its cause is gone; "" takes it away. */
export function banner(text: string, choices: Choice[] = []): void {
  const element = byId("banner");
  element.hidden = !text;
  (element.querySelector("p") as HTMLElement).textContent = text;
  const buttons = choices.map((choice) => {
    const button = make("button", "choice", choice.text) as HTMLButtonElement;
    button.type = "button";
    button.addEventListener("click", choice.run);
    return button;
  });
  element.querySelector(".choices")?.replaceChildren(...buttons);
}

export function hint(text: string, step: string): void {
  const element = byId("hint");
  if (element.textContent !== text) element.textContent = text;
  element.dataset.step = step;
  element.hidden = !text;
}

/** What to do next, in a line. */
export function hintFor(editor: Editor | null, isTouch: boolean): [string, string] {
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
  return [isTouch ? "" : "Enter: next image \u00b7 drag outside: another lesion \u00b7 ?: all keys", "0"];
}

const SOURCES = { drawn: "drawn", corrected: "corrected", accepted: "accepted", automatic: "automatic" };

export function showLesions(editor: Editor, previews: Map<string, Preview>, select: (id: string) => void,
                            remove: (id: string) => void): void {
  const cards = editor.lesions.map((lesion) => {
    const card = make("div", "lesion");
    card.classList.toggle("chosen", editor.selection?.id === lesion.id);
    card.addEventListener("click", () => select(lesion.id));
    const [w, h] = [lesion.big[2] - lesion.big[0], lesion.big[3] - lesion.big[1]];
    const top = make("div", "line");
    const bin = make("button", "plain bin", "\u2715") as HTMLButtonElement;
    bin.type = "button";
    bin.setAttribute("aria-label", `Delete lesion ${lesion.id}`);
    bin.addEventListener("click", (event) => {
      event.stopPropagation();
      remove(lesion.id);
    });
    top.append(make("strong", "", `Lesion ${lesion.id}`), make("span", `chip ${lesion.source}`, SOURCES[lesion.source]), bin);
    const size = `${Math.round(w)} \u00d7 ${Math.round(h)} px` + (lesion.core === "suggested" ? " \u00b7 core suggested" : "")
      + (lesion.seconds >= 0.5 ? ` \u00b7 ${Math.round(lesion.seconds)} s` : "");
    card.append(top, make("div", "fine", size));
    const preview = previews.get(lesion.id);
    if (preview?.pending) card.append(make("div", "fine", "model: looking at the image\u2026"));
    else if (preview?.model) card.append(meters(preview));
    return card;
  });
  byId("lesions").replaceChildren(...cards);
}

function meters(preview: Preview): HTMLElement {
  const row = make("div", "meters");
  const add = (name: string, value: number, title: string): void => {
    const item = make("div", "meter");
    item.title = title;
    const bar = make("i", "");
    const fill = make("b", "");
    fill.style.width = `${Math.round(Math.min(1, Math.max(0, value)) * 100)}%`;
    bar.append(fill);
    item.append(make("span", "", name), bar, make("span", "value", value.toFixed(2)));
    row.append(item);
  };
  if (preview.agreement !== undefined) add("agreement", preview.agreement, "IoU of the model's mask and the box prior's");
  if (preview.model?.iou !== undefined) add("predicted IoU", preview.model.iou, "the model's own estimate of its mask");
  return row;
}

export function showProposal(proposal: Proposal | null, isShown: boolean): void {
  const element = byId("proposal");
  element.hidden = !isShown || !proposal;
  if (!proposal) return;
  element.replaceChildren(make("strong", "", "Proposal"), make("span", "chip proposed", `doubt ${proposal.doubt.toFixed(2)}`),
    make("div", "fine", proposal.why.join(" \u00b7 ") || "nothing odd about it"));
}
