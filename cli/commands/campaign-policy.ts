import type { BodyIn, ResponseOf } from '@fleetkey/protocol/admin.ts'
import { GroupId } from '@fleetkey/protocol/ids.ts'
import { date, duration, number, text, UsageError, type Invocation } from '../command.ts'
import { when } from '../output.ts'

type Policy = ResponseOf<'campaign.show'>['policy']
type PolicyIn = Omit<BodyIn<'key.rotate'>, 'mayCut'>

/** Options of every command that starts a campaign. */
export const policyOptions = {
  waves: { type: 'string' },
  canary: { type: 'string' },
  targets: { type: 'string' },
  'success-threshold': { type: 'string' },
  'error-threshold': { type: 'string' },
  silent: { type: 'string' },
  manual: { type: 'boolean' },
  soak: { type: 'string' },
  deadline: { type: 'string' },
  retries: { type: 'string' },
  concurrency: { type: 'string' },
  window: { type: 'string' },
  start: { type: 'string' },
  approval: { type: 'boolean' },
  overlap: { type: 'string' },
} as const

export const policyUsage =
  '[--waves 10dev,0.1,1] [--canary GROUP] [--targets frozen|live] [--success-threshold 0.95] [--error-threshold 0.1] [--silent success|error|neither] ' +
  '[--manual] [--soak 10m] [--deadline 1h] [--retries 0] [--concurrency N] [--window mon-fri@22:00-04:00+01:00] [--start TIME] [--approval] [--overlap patient|strict]'

/** A whole number within bounds, or a usage error. */
export const whole = (call: Invocation, option: string, min: number, max: number): number | undefined => {
  const value = number(call, option, min, max)
  if (value !== undefined && !Number.isInteger(value)) throw new UsageError(`--${option} takes a whole number, not ${value}`)
  return value
}

const oneOf = <T extends string>(call: Invocation, option: string, choices: readonly T[]): T | undefined => {
  const given = text(call, option)
  if (given !== undefined && !(choices as readonly string[]).includes(given)) throw new UsageError(`--${option} takes ${choices.join(' or ')}, not ${given}`)
  return given as T | undefined
}

const waves = (given: string | undefined): Policy['waves'] | undefined => {
  if (given === undefined) return undefined
  const ends = given.split(',').map((end): Policy['waves'][number] | undefined => {
    const devices = /^([1-9]\d{0,8})dev$/.exec(end)?.[1]
    if (devices !== undefined) return { devices: Number(devices) }
    const share = /^(0\.\d+|1)$/.test(end) ? Number(end) : 0
    return share > 0 ? share : undefined
  })
  const known = ends.filter((end) => end !== undefined)
  const ascend = (of: readonly number[]): boolean => of.every((end, at) => end > (of[at - 1] ?? 0))
  const shares = known.filter((end) => typeof end === 'number')
  const counts = known.flatMap((end) => (typeof end === 'number' ? [] : [end.devices]))
  if (known.length < ends.length || !ascend(shares) || !ascend(counts) || known.at(-1) !== 1)
    throw new UsageError(`--waves takes ascending shares or numbers of devices that end with 1, such as 0.1,0.5,1 or 10dev,0.1,1, not ${given}`)
  return known
}

const weekdays = ['sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat'] as const

const daysOf = (given: string): number[] | undefined => {
  const days = given.split(',').map((part): number[] | undefined => {
    const [from = '', to = from, ...more] = part.split('-')
    const [first, last] = [weekdays.indexOf(from as never), weekdays.indexOf(to as never)]
    if (first < 0 || last < 0 || more.length > 0) return undefined
    return Array.from({ length: ((last - first + 7) % 7) + 1 }, (_, at) => (first + at) % 7)
  })
  return days.includes(undefined) ? undefined : [...new Set(days.flatMap((some) => some ?? []))].toSorted((one, other) => one - other)
}

/** `22:00-04:00` every day in UTC, `mon-fri@22:00-04:00+01:00`. The zone is the window's, not each device's. */
const window = (given: string | undefined): Policy['window'] | undefined => {
  if (given === undefined) return undefined
  const match = /^(?:([a-z,-]+)@)?([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)(?:Z|([+-])([01]\d):([0-5]\d))?$/.exec(given)
  const days = daysOf(match?.[1] ?? 'sun-sat')
  if (match === null || days === undefined) throw new UsageError(`--window takes times such as 22:00-04:00 (UTC) or mon-fri@22:00-04:00+01:00, not ${given}`)
  const [, , fromHour, fromMinute, toHour, toMinute, sign, zoneHour = '0', zoneMinute = '0'] = match
  const from = Number(fromHour) * 60 + Number(fromMinute)
  const minutes = (Number(toHour) * 60 + Number(toMinute) - from + 1440) % 1440
  const offset = (sign === '-' ? -1 : 1) * (Number(zoneHour) * 60 + Number(zoneMinute))
  return { from, minutes: minutes === 0 ? 1440 : minutes, days, offset }
}

const group = (given: string | undefined): GroupId | undefined => {
  if (given === undefined) return undefined
  const parsed = GroupId.safeParse(given)
  if (!parsed.success) throw new UsageError(`'${given}' is no group name`)
  return parsed.data
}

/** What the command line says of a campaign's policy; the rest is the server's default. */
export const policyOf = (call: Invocation): PolicyIn => {
  const given: PolicyIn = {
    waves: waves(text(call, 'waves')),
    canary: group(text(call, 'canary')),
    targets: oneOf(call, 'targets', ['frozen', 'live']),
    successThreshold: number(call, 'success-threshold', 0, 1),
    errorThreshold: number(call, 'error-threshold', 0, 1),
    silent: oneOf(call, 'silent', ['success', 'error', 'neither']),
    advance: call.options['manual'] === true ? 'manual' : undefined,
    soak: duration(call, 'soak'),
    deadline: duration(call, 'deadline'),
    retries: whole(call, 'retries', 0, 100),
    concurrency: whole(call, 'concurrency', 1, 100_000_000),
    window: window(text(call, 'window')),
    startAt: date(call, 'start'),
    approval: call.options['approval'] === true ? true : undefined,
    overlap: oneOf(call, 'overlap', ['patient', 'strict']),
  }
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined))
}

const clock = (minutes: number): string => `${String(Math.floor(minutes / 60)).padStart(2, '0')}:${String(minutes % 60).padStart(2, '0')}`

const windowText = ({ from, minutes, days, offset }: NonNullable<Policy['window']>): string => {
  const zone = offset === 0 ? 'Z' : `${offset < 0 ? '-' : '+'}${clock(Math.abs(offset))}`
  return `${days.length === 7 ? '' : `${days.map((day) => weekdays[day]).join(',')}@`}${clock(from)}-${clock((from + minutes) % 1440)}${zone}`
}

/** A policy as an operator spells it. */
export const policyFacts = (policy: Policy): Readonly<Record<string, unknown>> => ({
  ...policy,
  waves: policy.waves.map((end) => (typeof end === 'number' ? String(end) : `${end.devices}dev`)).join(','),
  window: policy.window === null ? null : windowText(policy.window),
  startAt: when(policy.startAt),
})
