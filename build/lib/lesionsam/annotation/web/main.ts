// Where the page begins.

import { App, NARROW } from "./app";
import { Problem } from "./api";
import { bindKeys, bindPointers, setFilter, showSwitches } from "./input";
import { FILTERS } from "./list";
import * as ui from "./ui";

function buttons(app: App): void {
  const runs: Record<string, () => void> = {
    "zoom-in": () => app.zoom(1.3), "zoom-out": () => app.zoom(1 / 1.3), fit: () => app.fit(),
    undo: () => { app.flush(); app.editor?.undo(); }, redo: () => { app.flush(); app.editor?.redo(); },
    accept: () => app.accept(), reject: () => app.reject(), "no-lesion": () => app.mark("no_lesion"),
    "cannot-tell": () => app.mark("cannot_tell"), previous: () => app.step(-1), next: () => app.step(1),
    "next-open": () => app.finish(),
  };
  for (const button of document.querySelectorAll<HTMLButtonElement>("[data-run]")) {
    button.tabIndex = -1; // keys do the same
    button.addEventListener("click", () => {
      app.watch.tick();
      runs[button.dataset.run ?? ""]?.();
    });
  }
}

function settings(app: App): void {
  for (const name of ["contrast", "gamma"] as const) {
    ui.byId<HTMLInputElement>(name).addEventListener("input", (event) => {
      app.setLook({ [name]: Number((event.target as HTMLInputElement).value) });
      showSwitches(app);
    });
  }
  for (const name of ["model", "prior", "fill", "boxes"] as const) {
    ui.byId<HTMLInputElement>(`show-${name}`).addEventListener("change", (event) => {
      app.shown[name] = (event.target as HTMLInputElement).checked;
      app.repaint();
    });
  }
  const filters = ui.byId("filters");
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
  ui.byId<HTMLInputElement>("search").addEventListener("input", (event) => app.list.setSearch((event.target as HTMLInputElement).value));
  ui.byId("menu").addEventListener("click", () => document.body.classList.toggle("list-away"));
  ui.byId("look-button").addEventListener("click", (event) => {
    (event.currentTarget as HTMLElement).setAttribute("aria-expanded", String(document.body.classList.toggle("look-open")));
  });
  ui.byId("help-button").addEventListener("click", () => ui.byId<HTMLDialogElement>("help").showModal());
  const who = ui.byId<HTMLInputElement>("who");
  const known = localStorage.getItem("lesionsam-who");
  who.value = known || app.session.who;
  app.saver.who = who.value.trim();
  who.addEventListener("change", () => {
    app.saver.who = who.value.trim();
    localStorage.setItem("lesionsam-who", app.saver.who);
  });
}

async function main(): Promise<void> {
  const canvas = ui.byId<HTMLCanvasElement>("canvas");
  const app = new App(canvas);
  if (window.matchMedia(NARROW).matches) document.body.classList.add("list-away");
  window.addEventListener("beforeunload", (event) => {
    app.flush();
    if (app.saver.unsaved.some((key) => app.saver.problemOf(key))) event.preventDefault();
  });
  document.addEventListener("visibilitychange", () => { if (document.hidden) app.flush(); });
  try {
    await app.start();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    ui.banner(error.message, [{ text: "Load again", run: () => location.reload() }]);
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
