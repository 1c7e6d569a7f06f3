import { Problem } from '@fleetkey/protocol/problem.ts'

/** What a query can ask of a device. */
export interface DeviceFacts {
  readonly batch: string
  readonly model: string
  readonly serial: string
  /** The release that it was last accepted with; null before that. */
  readonly release: string | null
  /** Null before it has enrolled. */
  readonly assurance: string | null
  readonly tags: Readonly<Record<string, string>>
}

/** One condition: the fact is one of these values, or, negated, none of them. A fact that is not there is none of any. */
interface Term {
  readonly fact: (of: DeviceFacts) => string | null
  readonly negated: boolean
  readonly values: ReadonlySet<string>
}

/** Conditions that all hold. */
export type Query = readonly Term[]

const fields: Readonly<Record<string, Term['fact']>> = {
  batch: ({ batch }) => batch,
  model: ({ model }) => model,
  serial: ({ serial }) => serial,
  release: ({ release }) => release,
  assurance: ({ assurance }) => assurance,
}

/** Longest query, most conditions and most values of one: a query is judged for every device that reports. */
export const queryLimits = { length: 1_000, terms: 16, values: 32 } as const
/** Names and values of tags. */
export const tagName = /^[a-z][a-z0-9-]{0,31}$/
export const tagValue = /^[A-Za-z0-9][A-Za-z0-9._/:-]{0,63}$/

const termPattern = /^([a-z][a-z0-9.-]{0,40})\s*(!?=)\s*(\S+)$/

const refuse = (what: string): never => {
  throw new Problem('malformed', `${what}; a query is FIELD=VALUE[,VALUE…] or FIELD!=VALUE, joined by AND, such as: batch=B1 AND tag.site=berlin`, {
    reason: 'group.query',
  })
}

/**
 * `batch=B1 AND tag.site=berlin,hamburg AND release!=gateway/1.0.0`: fields batch, model, serial, release, assurance and tag.NAME; several values are any of them.
 * Throws Problem('malformed') that says what is wrong.
 */
export const parseQuery = (text: string): Query => {
  if (text.length > queryLimits.length) refuse(`a query of ${text.length} characters`)
  const parts = text.trim().split(/\s+AND\s+/)
  if (parts.length > queryLimits.terms) refuse(`${parts.length} conditions`)
  return parts.map((part): Term => {
    const [, name = '', operator = '', list = ''] = termPattern.exec(part) ?? refuse(`${JSON.stringify(part.slice(0, 80))} is no condition`)
    const values = list.split(',')
    if (values.length > queryLimits.values) refuse(`${values.length} values of ${name}`)
    for (const value of values) if (!tagValue.test(value)) refuse(`${JSON.stringify(value.slice(0, 80))} is no value`)
    return { fact: factOf(name), negated: operator === '!=', values: new Set(values) }
  })
}

const factOf = (name: string): Term['fact'] => {
  if (Object.hasOwn(fields, name)) return fields[name] as Term['fact']
  const tag = name.startsWith('tag.') ? name.slice(4) : ''
  if (!tagName.test(tag)) refuse(`no field ${name}`)
  return ({ tags }) => (Object.hasOwn(tags, tag) ? (tags[tag] ?? null) : null)
}

/** Whether a device is what the query asks for. */
export const matches = (query: Query, facts: DeviceFacts): boolean =>
  query.every(({ fact, negated, values }) => {
    const value = fact(facts)
    return negated ? value === null || !values.has(value) : value !== null && values.has(value)
  })
