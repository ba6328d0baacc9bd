// Elements from names, properties and children. Strings become text, never markup.

/** `properties`: `class`, `on` (listeners by event), `style` (custom properties too), `data`; others are attributes, false and null leave one out. */
export function element(name, properties = {}, ...children) {
  return furnish(document.createElement(name), properties, children);
}

/** The same for SVG. */
export function drawing(name, properties = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}

function furnish(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [property, setting] of Object.entries(value)) node.style.setProperty(property, setting);
    } else if (name === "data") {
      Object.assign(node.dataset, value);
    } else {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** `1 token`, `2 tokens`. */
export const count = (number, noun, nouns = `${noun}s`) => `${number.toLocaleString("en")} ${number === 1 ? noun : nouns}`;
