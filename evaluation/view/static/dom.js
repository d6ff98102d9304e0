// Elements, icons and requests. Foreign strings only ever become text nodes or attributes, never HTML.

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const ICONS = {
  play: "M7 4.5v15l12-7.5z",
  pause: "M6 5h4v14H6zM14 5h4v14h-4z",
  stepBack: "M16.5 5v14L8 12zM5.5 5h2v14h-2z",
  stepOn: "M7.5 5v14l8.5-7zM16.5 5h2v14h-2z",
  previous: "M12 5v14l-8-7zM20 5v14l-8-7z",
  next: "M12 5v14l8-7zM4 5v14l8-7z",
};

export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

export function button(iconName, title, onclick) {
  return el("button", { type: "button", className: "icon", title, ariaLabel: title, onclick }, icon(iconName));
}

// `signal` ends a request that nobody waits for any more.
export async function get(name, query = {}, signal = undefined) {
  const response = await fetch(`/api/${name}?${new URLSearchParams(query)}`, { signal });
  if (!response.ok) throw Object.assign(new Error((await response.text()).trim()), { status: response.status });
  return response.json();
}

export function grouped(number) {
  return number.toLocaleString("en").replaceAll(",", "\u202f");
}
