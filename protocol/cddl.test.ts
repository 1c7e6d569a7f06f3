import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { z } from 'zod'
import { Body, Envelope } from './messages.ts'

/** docs/protocol.md and messages.ts, both brought into one notation and compared rule by rule. */
const page = readFileSync(new URL('../docs/protocol.md', import.meta.url), 'utf8')
const cddl = [...page.matchAll(/```cddl\n([\s\S]*?)```/g)].map(([, block = '']) => block.replaceAll(/;.*$/gm, '')).join('\n')

/** Text of every rule by its name. */
const rules = new Map(
  cddl
    .split(/^(?=[a-z0-9-]+ = )/m)
    .map((rule) => rule.trim())
    .filter((rule) => rule !== '')
    .map((rule) => [rule.slice(0, rule.indexOf(' = ')), rule.slice(rule.indexOf(' = ') + 3)] as const),
)

const tokensOf = (text: string): string[] => text.match(/"[^"]*"|\.size|\.regexp|\.cbor|-?\d+\.\.-?\d+|\d+\*\d+|#6\.\d+|[A-Za-z0-9-]+|[{}[\]()/,:]/g) ?? []
const choice = (parts: readonly string[]): string => [...new Set(parts)].toSorted().join(' / ')
const size = (least: number, most: number): string => (least === most ? `${least}` : `(${least}..${most})`)

/** A type of the page with every name in it replaced by what it stands for. */
const expanded = (text: string): string => {
  const tokens = tokensOf(text)
  let at = 0
  const take = (wanted?: string): string => {
    const token = tokens[at++]
    if (token === undefined || (wanted !== undefined && token !== wanted))
      throw new Error(`${wanted ?? 'a token'} expected, not ${token ?? 'the end'}: ${text}`)
    return token
  }
  const type = (): string => {
    const parts = [single()]
    while (tokens[at] === '/') {
      take()
      parts.push(single())
    }
    return choice(parts.flatMap((part) => (/^[{[]/.test(part) ? [part] : part.split(' / '))))
  }
  const fields = (): string => {
    const found: string[] = []
    while (tokens[at] !== '}') {
      const name = take()
      take(':')
      found.push(`${name}: ${type()}`)
      if (tokens[at] === ',') take()
    }
    take('}')
    return `{${found.toSorted().join(', ')}}`
  }
  const single = (): string => {
    const token = take()
    if (token === '{') return fields()
    if (token === '[') {
      const of = `[${take()} ${type()}]`
      take(']')
      return of
    }
    if (token === 'bstr' || token === 'tstr') {
      if (tokens[at] === '.regexp') return take('.regexp') && `${token} .regexp ${take()}`
      if (tokens[at] !== '.size') return token
      take()
      if (tokens[at] !== '(') return `${token} .size ${take()}`
      take()
      const of = `${token} .size (${take()})`
      take(')')
      return of
    }
    if (token.startsWith('"') || token.includes('..') || /^\d+$/.test(token) || ['uint', 'bool', 'null'].includes(token)) return token
    const rule = rules.get(token)
    if (rule === undefined) throw new Error(`no rule ${token}`)
    return expanded(rule)
  }
  const result = type()
  if (at !== tokens.length) throw new Error(`more than a type: ${tokens.slice(at).join(' ')}`)
  return result
}

interface JsonSchema {
  readonly type?: string
  readonly const?: string | number
  readonly enum?: readonly string[]
  readonly anyOf?: readonly JsonSchema[]
  readonly oneOf?: readonly JsonSchema[]
  readonly properties?: Readonly<Record<string, JsonSchema>>
  readonly required?: readonly string[]
  readonly additionalProperties?: boolean
  readonly items?: JsonSchema
  readonly minItems?: number
  readonly maxItems?: number
  readonly minimum?: number
  readonly maximum?: number
  readonly minLength?: number
  readonly maxLength?: number
  readonly pattern?: string
  readonly bytes?: readonly [number, number]
}

/** How short and how long a byte string may be, by trying. */
const bounds = (schema: z.ZodType): [number, number] => {
  const takes = (length: number): boolean => schema.safeParse(new Uint8Array(length)).success
  const edges = [0, ...Array.from({ length: 21 }, (_, power) => 2 ** power), 91, 600, 4096].flatMap((edge) => [edge - 1, edge, edge + 1])
  const some = edges.filter((length) => length >= 0).toSorted((a, b) => a - b)
  const least = some.find(takes)
  if (least === undefined) throw new Error('no length is accepted')
  let [low, high] = [least, 2 ** 22]
  while (low < high) {
    const middle = (low + high + 1) >> 1
    if (takes(middle)) low = middle
    else high = middle - 1
  }
  return [least, low]
}

const jsonSchema = (schema: z.ZodType): JsonSchema =>
  z.toJSONSchema(schema, {
    unrepresentable: 'any',
    reused: 'inline',
    override: ({ zodSchema, jsonSchema: json }) => {
      if (zodSchema._zod.def.type === 'custom') Object.assign(json, { bytes: bounds(zodSchema as unknown as z.ZodType) })
    },
  }) as JsonSchema

/** A schema in the same notation. */
const written = (of: JsonSchema): string => {
  if (of.bytes !== undefined) return `bstr .size ${size(...of.bytes)}`
  if (of.const !== undefined) return JSON.stringify(of.const)
  if (of.enum !== undefined) return choice(of.enum.map((value) => JSON.stringify(value)))
  const either = of.anyOf ?? of.oneOf
  if (either !== undefined) return choice(either.map(written).flatMap((part) => (/^[{[]/.test(part) ? [part] : part.split(' / '))))
  switch (of.type) {
    case 'object': {
      const names = Object.keys(of.properties ?? {})
      // Strict, and nothing is optional: what is not there is null.
      expect(of.additionalProperties).toBe(false)
      expect(of.required?.toSorted()).toEqual(names.toSorted())
      const fields = Object.entries(of.properties ?? {}).map(([name, value]) => `${name}: ${written(value)}`)
      return `{${fields.toSorted().join(', ')}}`
    }
    case 'array':
      return `[${of.minItems ?? 0}*${of.maxItems} ${written(of.items ?? {})}]`
    case 'integer':
      return of.minimum === 0 && of.maximum === Number.MAX_SAFE_INTEGER ? 'uint' : `${of.minimum}..${of.maximum}`
    case 'string':
      // CDDL's patterns are anchored and cannot look ahead; that a device id does not start with e- is said beside its rule.
      return of.pattern === undefined
        ? `tstr .size ${size(of.minLength ?? 0, of.maxLength ?? Number.NaN)}`
        : `tstr .regexp "${of.pattern.replace(/^\^(?:\(\?!e-\))?/, '').replace(/\$$/, '')}"`
    case 'boolean':
      return 'bool'
    case 'null':
      return 'null'
    default:
      throw new Error(`no notation for ${JSON.stringify(of)}`)
  }
}

const bodies = Body.options.map((schema) => [String([...schema.shape.type.values][0]), schema] as const)

test.each(bodies)('%s', (name, schema) => expect(expanded(rules.get(name) ?? '')).toBe(written(jsonSchema(schema))))

test('the envelope, and every body has its place in it', () => {
  const { body: _, ...shape } = Envelope.shape
  const rule = (rules.get('envelope') ?? '').replace(/\s*body: body,/, '')
  expect(expanded(rule)).toBe(written(jsonSchema(z.strictObject(shape))))
  expect((rules.get('body') ?? '').split(' / ').toSorted()).toEqual(bodies.map(([name]) => name).toSorted())
})

test('a changed page is noticed', () =>
  expect(expanded((rules.get('retire') ?? '').replace('epoch / null', 'epoch'))).not.toBe(expanded(rules.get('retire') ?? '')))
