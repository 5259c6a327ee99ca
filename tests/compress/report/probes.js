// What test_browser.py asks of a page.

const unfold = () => document.querySelectorAll("details").forEach(each => { each.open = true; });
const parsed = colour => {
  const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
  return {rgb: [r, g, b], a};
};
const over = ({rgb, a}, under) => rgb.map((value, index) => a * value + (1 - a) * under[index]);

// The contrast of two colours, 1 to 21, as the Web Content Accessibility Guidelines define it.
const contrast = (one, other) => {
  const [dark, light] = [one, other].map(rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  }).sort((a, b) => a - b);
  return (light + .05) / (dark + .05);
};

// The colour behind an element: of its ancestors, and of the square that stands beside it in a chart.
const behind = element => {
  if (!element) return [255, 255, 255];
  const square = element.matches("g") && element.querySelector("rect"), under = behind(element.parentElement);
  if (!square) return over(parsed(getComputedStyle(element).backgroundColor), under);
  const {fill, fillOpacity} = getComputedStyle(square);
  return over({...parsed(fill), a: Number(fillOpacity)}, under);
};

// All elements with text of their own, folded ones too, each with its contrast to what is behind it.
const contrasts = () => {
  unfold();
  const written = element => [...element.childNodes].some(node => node.nodeType == Node.TEXT_NODE && node.data.trim());
  return [...document.querySelectorAll("body *:not(script, style, title)")]
    .filter(element => element.getClientRects().length && written(element))
    .map(element => {
      const {fill, color} = getComputedStyle(element), under = behind(element);
      return [element.textContent, contrast(over(parsed(element.closest("svg") ? fill : color), under), under)];
    });
};

// What reaches beyond the right edge, folded or not; `scrolled`: also what only scrolls there.
const outside = scrolled => {
  unfold();
  return [...document.querySelectorAll("body *")]
    .filter(each => scrolled || !each.parentElement.closest(".scroll, pre"))
    .filter(each => each.getClientRects().length && each.getBoundingClientRect().right > innerWidth + 1)
    .map(each => each.outerHTML.slice(0, 80));
};

// Pairs of names in one chart whose letters touch.
const touching = () => [...document.querySelectorAll("svg.chart")].flatMap(chart => {
  const names = [...chart.querySelectorAll(".label")].map(each => [each.textContent, each.getBBox()]);
  const apart = (a, b) => a.x + a.width < b.x || a.y + a.height - 3 < b.y;
  return names.flatMap(([name, a], place) => names.slice(place + 1)
    .filter(([, b]) => !apart(a, b) && !apart(b, a)).map(([other]) => `${name} and ${other}`));
});

// Of a picture: how many colours it has, how red the most frequent one is, and the share of all others.
const colours = async source => {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const counts = new Map();
  for (const pixel of new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer))
    counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
  const [paper, most] = [...counts].reduce((a, b) => a[1] > b[1] ? a : b);
  return {colours: counts.size, red: paper & 255, covered: 1 - most / (image.width * image.height)};
};
