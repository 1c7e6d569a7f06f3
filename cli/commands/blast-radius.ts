import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { exit, number, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { everyPage } from './paging.ts'

type DeviceRadius = ResponseOf<'device.blast-radius'>
type CaRadius = ResponseOf<'ca.blast-radius'>
type StationRadius = ResponseOf<'station.blast-radius'>
type BatchRadius = ResponseOf<'batch.blast-radius'>
/** What many devices together could read. */
type SharedRadius = Pick<CaRadius, 'devices' | 'states' | 'first' | 'connected' | 'waiting' | 'topics' | 'keyCount' | 'keys' | 'next'>

const during = (span: DeviceRadius['identity'], never: string): string =>
  span === null ? never : `${when(span.from)} until ${span.until === null ? 'now' : when(span.until)}`

/** A row for each epoch of each key with what `column` says of it, then a row for each topic that a key protected meanwhile. */
const keysText = <E extends { epoch: number; state: string; heldFrom: number; heldUntil: number | null; usedFrom: number | null; usedUntil: number | null }>(
  keys: readonly {
    key: string
    protection: string
    epochs: E[]
    topics: { topic: string; from: number; until: number | null }[]
    more: { epochs: number; topics: number }
  }[],
  column: { readonly name: string; readonly of: (epoch: E) => string },
): string => {
  const used = ({ usedFrom, usedUntil }: E): string => (usedFrom === null ? '-' : usedUntil === null ? 'now' : when(usedUntil))
  const older = keys.flatMap(({ key, more }) => [
    ...(more.epochs === 0 ? [] : [`${more.epochs} older epochs of ${key}`]),
    ...(more.topics === 0 ? [] : [`${more.topics} earlier topics of ${key}`]),
  ])
  const read = keys.flatMap(({ key, topics }) => topics.map((one) => [one.topic, key, when(one.from), one.until === null ? 'now' : when(one.until)]))
  return [
    table([
      ['KEY', 'PROTECTION', 'EPOCH', 'STATE', column.name, 'HELD FROM', 'ERASED', 'IN USE FROM', 'UNTIL'],
      ...keys.flatMap(({ key, protection, epochs }) =>
        epochs.map((one) => [
          key,
          protection,
          String(one.epoch),
          one.state,
          column.of(one),
          when(one.heldFrom),
          when(one.heldUntil),
          when(one.usedFrom),
          used(one),
        ]),
      ),
    ]),
    ...(read.length === 0 ? [] : [table([['TOPIC READ', 'BY KEY', 'FROM', 'UNTIL'], ...read])]),
    ...(older.length === 0 ? [] : [`not listed: ${older.join(', ')}`]),
  ].join('\n\n')
}

export const deviceRadiusText = ({ state, identity, topics, keys, notDelivered }: DeviceRadius): string =>
  [
    facts({
      state,
      identity: during(identity, 'never had one'),
      topics: topics.join(', ') || '-',
      'granted, never sent': notDelivered.join(', ') || '-',
    }),
    keysText(keys, { name: 'PROOF', of: ({ proof }) => proof }),
  ].join('\n\n')

/** `more`: the command that lists the other keys. */
const sharedText = (radius: SharedRadius, own: Readonly<Record<string, unknown>>, more: string): string => {
  const { devices, states, first, connected, waiting, topics, keyCount, keys, next } = radius
  const counted = Object.entries(states).flatMap(([state, count]) => (count === 0 ? [] : [`${count} ${state}`]))
  const some = first.length === 0 ? '' : `: ${first.join(', ')}${devices > first.length ? ', …' : ''}`
  return [
    facts({
      ...own,
      devices: `${devices}${counted.length === 0 ? '' : ` (${counted.join(', ')})`}, ${connected} of them connected${some}`,
      topics: topics.length === 0 ? '-' : `${topics.slice(0, 6).join(', ')}${devices > 3 ? ', …' : ''}`,
      'waiting messages': waiting,
    }),
    keysText(keys, { name: 'DEVICES', of: (epoch) => String(epoch.devices) }),
    ...(next === null ? [] : [`${keys.length} of ${keyCount} keys: ${more}`]),
  ].join('\n\n')
}

const orderedText = (order: { at: number; by: string; reason: string }): string => `${when(order.at)} by ${order.by}: ${order.reason}`

export const batchRadiusText = (radius: BatchRadius): string =>
  sharedText(
    radius,
    {
      batch: `${radius.batch}, signed by ${radius.station}`,
      identities: during(radius.identity, 'none ever had one'),
      standing: radius.standing === null ? '-' : `${radius.standing.state} ${orderedText(radius.standing)}`,
    },
    `batch blast-radius ${radius.batch}`,
  )

export const stationRadiusText = (radius: StationRadius): string =>
  sharedText(
    radius,
    {
      station: radius.station,
      revoked: radius.revoked === null ? '-' : orderedText(radius.revoked),
      suspended: radius.suspended === null ? '-' : orderedText(radius.suspended),
      identities: during(radius.identity, 'none ever had one'),
      'it signed': `${radius.batches} batches, ${radius.releases} releases`,
      certificates: radius.certificates.map(({ serial, state, notAfter }) => `${serial} ${state} until ${when(notAfter)}`).join(', ') || '-',
    },
    `station blast-radius ${radius.station}`,
  )

export const caRadiusText = (radius: CaRadius): string => {
  const { issuing, serial, revoked, suspended, state, rotated, generation } = radius
  return sharedText(
    radius,
    {
      'issuing CA': `${issuing} (${serial})`,
      state: revoked === null ? state : `revoked ${when(revoked.at)} by ${revoked.by}, ${revoked.code}: ${revoked.reason}`,
      ...(suspended === null ? {} : { suspended: orderedText(suspended) }),
      accepted: during(radius, '-'),
      'keys that its revocation rotates': rotated.join(', ') || '-',
    },
    `ca blast-radius ${generation}`,
  )
}

export const limitOption = { limit: { type: 'string' } } as const

/** Prints a blast radius with every page of its keys, or the first `--limit` keys. */
export const wholeRadius = async <R extends SharedRadius>(
  call: Invocation,
  fetch: (query: { after: string | undefined; limit: number }) => Promise<R>,
  human: (radius: R) => string,
): Promise<number> => {
  const most = number(call, 'limit', 1, 1_000_000) ?? Infinity
  let last: R | undefined
  const keys = await everyPage(async (after) => {
    last = await fetch({ after, limit: Math.min(most, 1000) })
    return { items: last.keys, next: last.next }
  }, most)
  if (last === undefined) return exit.remote
  const whole: R = { ...last, keys, next: keys.length < last.keyCount ? (keys.at(-1)?.key ?? null) : null }
  call.out.result(whole, () => human(whole))
  return exit.ok
}

/** An order that shows what could be read before and after it, or only says what it would do (`--dry-run`). */
export const aroundOrder = async <R, O extends object>(
  call: Invocation,
  of: {
    readonly radius: () => Promise<R>
    readonly text: (radius: R) => string
    readonly preview: () => Promise<O>
    readonly order: () => Promise<O>
    readonly said: (outcome: O, isDry: boolean) => string
  },
): Promise<number> => {
  const before = await of.radius()
  if (call.options['dry-run'] === true) {
    const would = await of.preview()
    call.out.result({ ...would, before }, () => `${of.said(would, true)}\n\nWhat could be read:\n${of.text(before)}`)
    return exit.ok
  }
  const done = await of.order()
  const after = await of.radius()
  call.out.result({ ...done, before, after }, () =>
    [of.said(done, false), `What could be read before:\n${of.text(before)}`, `And now:\n${of.text(after)}`].join('\n\n'),
  )
  return exit.ok
}

export const dryRunOption = { 'dry-run': { type: 'boolean', default: false } } as const
