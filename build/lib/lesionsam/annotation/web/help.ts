// Every key and what it does: the one table that the keyboard and the help page are made from.

export interface Binding {
  keys: string[]; // as `keyName` gives them
  shown: string; // as the help shows them, alternatives separated by a space
  what: string;
  group: string;
  run: () => void;
}

const ORDER = ["Draw", "Change", "Decide", "Move about", "Look"];
const GESTURES: [string, string, string][] = [
  ["Draw", "drag", "big box: rough extent, the lesion lies inside it"],
  ["Draw", "drag inside it", "core: a box that lies inside the lesion"],
  ["Draw", "Shift drag", "another big box, also over one that is there"],
  ["Change", "drag edge or corner", "resize; the core stays inside the big box"],
  ["Change", "drag inside", "move the core, or the lesion as a whole"],
  ["Decide", "list Review", "proposals, the doubtful first; then what was accepted unseen"],
  ["Look", "wheel, two fingers", "zoom; two fingers also move the picture"],
  ["Look", "Space drag, right drag", "move the picture"],
];

/** Modifiers and key, such as "Ctrl+Shift+z" or "ArrowLeft"; letters are lower case unless Shift alone is held. */
export function keyName(event: KeyboardEvent): string {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const isSign = event.key.length === 1 && !/[a-z0-9 ]/i.test(event.key);
  const parts = [
    event.ctrlKey || event.metaKey ? "Ctrl" : "", event.altKey ? "Alt" : "", event.shiftKey && !isSign ? "Shift" : "", key,
  ];
  return parts.filter(Boolean).join("+");
}

export function fillHelp(container: HTMLElement, bindings: Binding[]): void {
  container.replaceChildren();
  for (const group of ORDER) {
    const section = document.createElement("section");
    const title = document.createElement("h3");
    title.textContent = group;
    const list = document.createElement("dl");
    const lines: [string, string][] = [
      ...GESTURES.filter((each) => each[0] === group).map((each): [string, string] => [each[1], each[2]]),
    ];
    for (const [shown, what] of lines) list.append(...line([shown], what, "gesture"));
    for (const each of bindings.filter((binding) => binding.group === group)) {
      list.append(...line(each.shown.split(" "), each.what, "key"));
    }
    section.append(title, list);
    container.append(section);
  }
}

function line(names: string[], what: string, kind: string): HTMLElement[] {
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
