/** Checks of decoded values. By hand: the process that holds the keys loads as little as it can. */

/** An object (not a Map, not an array) with these fields and no other. */
export const hasExactly = (value: unknown, fields: readonly string[]): value is Record<string, unknown> =>
  typeof value === 'object' &&
  value !== null &&
  Object.getPrototypeOf(value) === Object.prototype &&
  Object.keys(value).length === fields.length &&
  fields.every((field) => Object.hasOwn(value, field))

/** A whole number between both, inclusive. */
export const isCount = (value: unknown, least: number, most: number): value is number =>
  Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most

export const isBytes = (value: unknown, most: number): value is Uint8Array => value instanceof Uint8Array && value.length <= most
