import { createHash } from 'node:crypto'
import { z } from 'zod'
import type { ProfileName } from './certificate.ts'

const day = 86_400_000

/** How long before something ends an alert is raised, once each. */
export const defaultMarks: readonly number[] = [30 * day, 14 * day, 7 * day, day]

const mark = z
  .string()
  .regex(/^[1-9]\d{0,2}[hd]$/, 'not a time such as 36h or 30d')
  .transform((text) => Number(text.slice(0, -1)) * (text.endsWith('h') ? 3_600_000 : day))

/** What a configuration may say about alerts. Files are named, not read, here. */
export const AlertSettings = z.strictObject({
  marks: z
    .array(mark)
    .min(1)
    .max(16)
    .refine((marks) => new Set(marks).size === marks.length, 'a mark twice')
    .optional(),
  webhook: z
    .strictObject({
      url: z
        .string()
        .max(2000)
        .refine((text) => URL.canParse(text) && new URL(text).protocol === 'https:', 'not an https:// URL')
        .refine((text) => !URL.canParse(text) || (new URL(text).username === '' && new URL(text).password === ''), 'a URL with a password in it'),
      /** `whsec_` and 24 to 64 bytes in base64, alone in the file. */
      secretFile: z.string().min(1).max(4096),
      /** PEM: CAs that vouch for the receiver; those of the system unless given. */
      caFile: z.string().min(1).max(4096).optional(),
    })
    .optional(),
})
export type AlertSettings = z.infer<typeof AlertSettings>

/** Something that ends at a time. `begins`: when it was made, so that a mark is not longer than what it is for. */
export interface Deadline {
  readonly name: string
  readonly kind: 'ca' | 'role' | 'tls' | 'ocsp' | 'crl'
  readonly begins: number
  readonly at: number
}

/** Certificates of one kind that end on one day. */
export interface DayOfEnds {
  /** Its first millisecond, UTC. */
  readonly at: number
  readonly profile: ProfileName
  readonly issuer: string
  readonly certificates: number
  /** What the profile lets one live. */
  readonly life: number
}

export interface Alert {
  /** The same for the same mark of the same thing, whoever raises it and how often: a receiver drops what it has seen. */
  readonly id: string
  readonly type: 'certificate.expiring' | 'certificate.expired' | 'certificates.expiring' | 'crl.stale'
  /** `issuing-2`; `device-identity by issuing-ca` */
  readonly subject: string
  readonly at: number
  /** Milliseconds before `at`; null for what is over. */
  readonly mark: number | null
  readonly certificates: number | null
}

/** What renews itself does so in the last third: a mark above that would be passed by what nobody has to care for. */
const counts = (life: number) => (one: number) => one <= life / 3

/** The tightest mark that is passed: of several that were passed while nobody looked only this one is raised. */
const passed = (marks: readonly number[], left: number): number | undefined => marks.filter((one) => left <= one).toSorted((a, b) => a - b)[0]

const alert = (tenant: string, of: Omit<Alert, 'id'>): Alert => {
  const text = ['fleetkey/1/alert', tenant, of.type, of.subject, of.at, of.mark].join('\n')
  return { id: `msg_${createHash('sha256').update(text).digest('hex').slice(0, 32)}`, ...of }
}

const ofDeadline = (tenant: string, { name, kind, begins, at }: Deadline, marks: readonly number[], now: number): readonly Alert[] => {
  const common = { subject: name, at, certificates: null }
  // A list is made anew long before: one with a quarter of its time left was not.
  if (kind === 'crl') return at - now > (at - begins) / 4 ? [] : [alert(tenant, { ...common, type: 'crl.stale', mark: null })]
  if (at <= now) return [alert(tenant, { ...common, type: 'certificate.expired', mark: null })]
  const found = passed(marks.filter(counts(at - begins)), at - now)
  return found === undefined ? [] : [alert(tenant, { ...common, type: 'certificate.expiring', mark: found })]
}

const ofDay = (tenant: string, { at, profile, issuer, certificates, life }: DayOfEnds, marks: readonly number[], now: number): readonly Alert[] => {
  const found = passed(marks.filter(counts(life)), at - now)
  if (found === undefined || certificates === 0) return []
  return [alert(tenant, { type: 'certificates.expiring', subject: `${profile} by ${issuer}`, at, mark: found, certificates })]
}

/** Alerts that are due, raised before or not. Pure: asked again at the same moment it says the same. */
export const alertsDue = (of: {
  readonly tenant: string
  readonly deadlines: readonly Deadline[]
  readonly days: readonly DayOfEnds[]
  readonly marks: readonly number[]
  readonly now: number
}): readonly Alert[] => [
  ...of.deadlines.flatMap((one) => ofDeadline(of.tenant, one, of.marks, of.now)),
  ...of.days.flatMap((one) => ofDay(of.tenant, one, of.marks, of.now)),
]

/** In words, for people. */
export const alertText = ({ type, subject, at, mark, certificates }: Alert): string => {
  const end = new Date(at).toISOString().slice(0, type === 'certificates.expiring' ? 10 : 16)
  if (type === 'crl.stale') return `the list ${subject} was not made anew: it can be relied on until ${end}`
  if (type === 'certificate.expired') return `${subject} has ended at ${end}`
  const left = mark === null ? '' : mark % day === 0 ? `${mark / day} days` : `${mark / 3_600_000} hours`
  return type === 'certificate.expiring'
    ? `${subject} ends at ${end}: less than ${left}`
    : `${certificates ?? 0} certificates in force (${subject}) end on ${end}: less than ${left}`
}
